/* Asynchronous block callbacks: transfers of a queue end when and in the order that the device says, without a thread of
 * the library; failures arrive as they were told; calls that wait are served by such a device alone, too; closing and
 * freeing wait for what was begun.
 */
#include "harness.h"

#include "asynchronous.h"

#include <poll.h>

#define MANY 24
#define PIECE 4096u

static struct qcr_error error;
static struct slow slow;
static struct qcr_image *image;
static unsigned char data[MANY][PIECE];

static struct qcr_image *slow_open(int both)
{
    struct qcr_block_callbacks callbacks = slow_callbacks(&slow, both);
    struct qcr_image *opened = NULL;
    slow.memory.destroyed = 0;
    EXPECT(0, qcr_open_callbacks(&callbacks, NULL, NULL, &opened, &error));
    return opened;
}

static void close_and_free(void)
{
    EXPECT(0, qcr_close(image, &error));
    CHECK(slow.memory.destroyed == 0);
    qcr_free(image);
    CHECK(slow.memory.destroyed == 1);
}

static int threads_of_process(void)
{
    char line[256];
    int count = -1;
    FILE *status = fopen("/proc/self/status", "r");
    CHECK(status != NULL);
    while (fgets(line, sizeof(line), status) != NULL) {
        if (strncmp(line, "Threads:", 8) == 0) {
            count = atoi(line + 8);
        }
    }
    fclose(status);
    CHECK(count > 0);
    return count;
}

static size_t reap(struct qcr_queue *queue, struct qcr_completion *done, size_t min)
{
    size_t count = 0;
    EXPECT(0, qcr_queue_reap(queue, done, MANY, min, 60000000, &count, &error));
    return count;
}

/* Ends what waits at `index` with a result of its own. */
static void end_with(int index, int result)
{
    struct submitted one;
    pthread_mutex_lock(&slow.lock);
    CHECK(index < slow.count);
    one = slow_take(&slow, index);
    pthread_mutex_unlock(&slow.lock);
    if (result != 0) {
        qcr_io_complete(one.io, result);
    } else {
        slow_end(&slow, &one);
    }
}

static void which_are_needed(void)
{
    struct qcr_block_callbacks callbacks;
    struct qcr_options options;
    QCR_INIT(options);
    EXPECT(0, qcr_options_init(&options, &error));
    slow.memory.destroyed = 0;
    callbacks = slow_callbacks(&slow, 0);
    callbacks.submit_preadv = NULL;
    EXPECT(-EINVAL, qcr_open_callbacks(&callbacks, NULL, NULL, &image, &error));
    CHECK(strcmp(error.field, "preadv") == 0);
    callbacks = slow_callbacks(&slow, 0);
    callbacks.submit_pwritev = NULL;
    EXPECT(-EINVAL, qcr_open_callbacks(&callbacks, NULL, NULL, &image, &error));
    CHECK(strcmp(error.field, "pwritev") == 0);
    callbacks = slow_callbacks(&slow, 0);
    callbacks.submit_flush = NULL;
    EXPECT(-EINVAL, qcr_open_callbacks(&callbacks, NULL, NULL, &image, &error));
    CHECK(strcmp(error.field, "flush") == 0 && slow.memory.destroyed == 3);
    /* To read, a way to read is enough. */
    callbacks.submit_pwritev = NULL;
    options.flags |= QCR_READ_ONLY;
    slow.memory.destroyed = 0;
    EXPECT(0, qcr_open_callbacks(&callbacks, &options, NULL, &image, &error));
    EXPECT(0, qcr_read(image, data, sizeof(data), 0, &error));
    close_and_free();
}

/* Calls that wait for their end, a compaction and a check, by submitting alone. */
static void everything_by_submitting(void)
{
    struct qcr_check_report report;
    struct qcr_block_callbacks callbacks = slow_callbacks(&slow, 0);
    unsigned i;
    QCR_INIT(report);
    image = slow_open(0);
    EXPECT(0, qcr_start(image, &error));
    for (i = 0; i < 16; i++) {
        fill(data[0], PIECE, i, 1);
        EXPECT(0, qcr_write(image, data[0], PIECE, i * 65536, &error));
    }
    EXPECT(0, qcr_flush(image, &error));
    EXPECT(0, qcr_discard(image, 0, 8 * 65536, &error));
    EXPECT(0, qcr_compact(image, NULL, NULL, NULL, &error));
    for (i = 8; i < 16; i++) {
        fill(data[0], PIECE, i, 1);
        EXPECT(0, qcr_read(image, data[1], PIECE, i * 65536, &error));
        CHECK(memcmp(data[0], data[1], PIECE) == 0);
    }
    EXPECT(0, qcr_stop(image, &error));
    close_and_free();
    slow.memory.destroyed = 0;
    EXPECT(0, qcr_check_callbacks(&callbacks, QCR_REPAIR_NONE, NULL, NULL, &report, &error));
    CHECK(report.corruptions == 0 && report.leaks == 0);
    CHECK(slow.at_once > 0 && slow.later > 0);
}

static void in_the_order_of_the_device(struct qcr_queue *queue)
{
    struct qcr_completion done[MANY];
    const int threads = threads_of_process();
    size_t count = 0, got = 0;
    int i, fd;
    struct pollfd poll_fd;

    for (i = 0; i < MANY; i++) {
        fill(data[i], PIECE, (uint64_t)i, 7);
        EXPECT(0, qcr_queue_write(queue, data[i], PIECE, (uint64_t)i * PIECE, (uint64_t)i, &error));
    }
    CHECK(slow_waiting(&slow) == MANY && threads_of_process() == threads);
    CHECK(reap(queue, done, 0) == 0);
    EXPECT(0, qcr_queue_eventfd(queue, &fd, &error));
    EXPECT(0, qcr_queue_arm(queue, &count, &error));
    poll_fd.fd = fd;
    poll_fd.events = POLLIN;
    CHECK(count == 0 && poll(&poll_fd, 1, 0) == 0);
    for (i = MANY; i-- > 0;) {
        end_with(i, 0);
        CHECK(poll(&poll_fd, 1, 0) == 1);
    }
    CHECK(reap(queue, done, MANY) == MANY);
    for (i = 0; i < MANY; i++) {
        CHECK(done[i].result == 0 && done[i].user_data == (uint64_t)(MANY - 1 - i));
    }
    CHECK(poll(&poll_fd, 1, 0) == 0);

    /* The device ends them while this thread sleeps for them. */
    memset(data, 0, sizeof(data));
    for (i = 0; i < MANY; i++) {
        EXPECT(0, qcr_queue_read(queue, data[i], PIECE, (uint64_t)i * PIECE, (uint64_t)i, &error));
    }
    slow_hold(&slow, 0);
    while (got < MANY) {
        count = reap(queue, done, 1);
        for (i = 0; i < (int)count; i++) {
            unsigned char want[PIECE];
            const uint64_t which = done[i].user_data;
            fill(want, PIECE, which, 7);
            CHECK(done[i].result == 0 && memcmp(want, data[which], PIECE) == 0);
        }
        got += count;
    }
    slow_hold(&slow, 1);
    CHECK(threads_of_process() == threads && slow.out_of_order > 0);
}

static void failures_as_they_were_told(struct qcr_queue *queue)
{
    static const int told[] = {-EIO, -ENOSPC, 5, -4096, 0};
    static const int results[] = {-EIO, -ENOSPC, -EIO, -EIO, 0};
    struct qcr_completion done[MANY];
    unsigned i;
    for (i = 0; i < 5; i++) {
        EXPECT(0, qcr_queue_read(queue, data[i], PIECE, i * PIECE, i, &error));
    }
    for (i = 0; i < 5; i++) {
        end_with(0, told[i]);
    }
    CHECK(reap(queue, done, 5) == 5);
    for (i = 0; i < 5; i++) {
        CHECK(done[i].user_data == i && done[i].result == results[i]);
    }
    EXPECT(-EIO, qcr_queue_failure(queue, &error));
}

static void *let_go(void *argument)
{
    (void)argument;
    rest(30);
    slow_hold(&slow, 0);
    return NULL;
}

int main(void)
{
    struct qcr_queue *queue = NULL;
    pthread_t thread;
    unsigned char *cluster = (unsigned char *)calloc(1, 2 * 65536);
    int i;

    alarm(120);
    CHECK(cluster != NULL);
    QCR_INIT(error);
    slow_init(&slow, 2);
    memory_create(&slow.memory, 4 * MIB);
    which_are_needed();
    everything_by_submitting();

    image = slow_open(1);
    /* What is overwritten below. */
    EXPECT(0, qcr_write(image, cluster, 2 * 65536, 0, &error));
    EXPECT(0, qcr_queue_create(image, NULL, &queue, &error));
    slow_hold(&slow, 1);
    in_the_order_of_the_device(queue);
    failures_as_they_were_told(queue);
    /* A close waits for the transfers, and so does the end of the queue. */
    EXPECT(0, qcr_queue_write(queue, data[0], PIECE, 0, 1, &error));
    CHECK(pthread_create(&thread, NULL, let_go, NULL) == 0);
    EXPECT(0, qcr_close(image, &error));
    CHECK(slow_waiting(&slow) == 0);
    pthread_join(thread, NULL);
    qcr_queue_free(queue);
    qcr_free(image);
    CHECK(slow.memory.destroyed == 1);

    image = slow_open(1);
    EXPECT(0, qcr_queue_create(image, NULL, &queue, &error));
    EXPECT(0, qcr_write(image, cluster, 2 * 65536, 0, &error));
    slow_hold(&slow, 1);
    for (i = 0; i < 4; i++) {
        EXPECT(0, qcr_queue_write(queue, data[i], PIECE, (uint64_t)i * PIECE, 1, &error));
    }
    CHECK(slow_waiting(&slow) == 4);
    CHECK(pthread_create(&thread, NULL, let_go, NULL) == 0);
    qcr_queue_free(queue);
    CHECK(slow_waiting(&slow) == 0);
    pthread_join(thread, NULL);
    close_and_free();

    /* A flush that fails is one, however it was begun. */
    image = slow_open(0);
    EXPECT(0, qcr_write(image, data[0], PIECE, 3 * MIB, &error));
    slow.flush_fails = 1;
    EXPECT(-EIO, qcr_flush(image, &error));
    slow.flush_fails = 0;
    EXPECT(-EROFS, qcr_write(image, data[0], PIECE, 0, &error));
    qcr_free(image);
    slow_free(&slow);
    free(cluster);
    return 0;
}
