/* A panic inside the library (by its test hooks) is contained: the call and all later ones say so, nothing more reaches
 * the device, closing and freeing work, and the image can be opened again with what was flushed.
 */
#include "harness.h"

#include "asynchronous.h"

#ifdef __cplusplus
extern "C" {
#endif
int qcr_test_panic(struct qcr_image *image, struct qcr_error *error);
int qcr_test_panic_in_device(struct qcr_image *image, struct qcr_error *error);
#ifdef __cplusplus
}
#endif

static struct qcr_error error;

static void is_refused(struct qcr_image *image)
{
    struct qcr_stats stats;
    struct qcr_extent extent;
    struct qcr_check_report report;
    unsigned char sector[512];
    QCR_INIT(stats);
    QCR_INIT(extent);
    QCR_INIT(report);
    memset(sector, 0, sizeof(sector));
    EXPECT(-ENOTRECOVERABLE, qcr_read(image, sector, sizeof(sector), 0, &error));
    EXPECT(-ENOTRECOVERABLE, qcr_write(image, sector, sizeof(sector), 0, &error));
    EXPECT(-ENOTRECOVERABLE, qcr_discard(image, 0, 65536, &error));
    EXPECT(-ENOTRECOVERABLE, qcr_flush(image, &error));
    EXPECT(-ENOTRECOVERABLE, qcr_start(image, &error));
    EXPECT(-ENOTRECOVERABLE, qcr_stop(image, &error));
    EXPECT(-ENOTRECOVERABLE, qcr_compact(image, NULL, NULL, NULL, &error));
    EXPECT(-ENOTRECOVERABLE, qcr_get_stats(image, &stats, &error));
    EXPECT(-ENOTRECOVERABLE, qcr_get_extent(image, 0, 512, &extent, &error));
    EXPECT(-ENOTRECOVERABLE, qcr_check(image, NULL, NULL, &report, &error));
}

/* A fault while a queue begins a transfer: the request has failed, and nothing waits for it. */
static void in_a_queue(void)
{
    static struct slow slow;
    struct qcr_block_callbacks callbacks;
    struct qcr_queue *queue = NULL;
    struct qcr_image *image = NULL;
    struct qcr_completion done;
    unsigned char data[4096];
    size_t count = 0;
    memset(data, 0, sizeof(data));
    slow_init(&slow, 2);
    memory_create(&slow.memory, MIB);
    callbacks = slow_callbacks(&slow, 1);
    EXPECT(0, qcr_open_callbacks(&callbacks, NULL, NULL, &image, &error));
    EXPECT(0, qcr_write(image, data, sizeof(data), 0, &error));
    EXPECT(0, qcr_queue_create(image, NULL, &queue, &error));
    EXPECT(0, qcr_test_panic_in_device(image, &error));
    EXPECT(0, qcr_queue_read(queue, data, sizeof(data), 0, 9, &error));
    EXPECT(-ENOTRECOVERABLE, qcr_queue_read(queue, data, sizeof(data), 0, 10, &error));
    EXPECT(0, qcr_queue_reap(queue, &done, 1, 1, -1, &count, &error));
    CHECK(count == 1 && done.user_data == 9 && done.result == -ENOTRECOVERABLE);
    qcr_queue_free(queue);
    is_refused(image);
    qcr_free(image);
    CHECK(slow.memory.destroyed == 1);
    slow_free(&slow);
}

int main(void)
{
    struct memory memory, other;
    struct qcr_image *image, *bystander;
    struct qcr_block_callbacks callbacks;
    struct qcr_check_report report;
    unsigned char *before, data[65536], back[65536];
    uint64_t length;
    int deep;

    alarm(120);
    QCR_INIT(error);
    QCR_INIT(report);
    in_a_queue();
    memory_init(&other);
    memory_create(&other, MIB);
    bystander = memory_open(&other);

    for (deep = 0; deep < 2; deep++) {
        memory_init(&memory);
        memory_create(&memory, 4 * MIB);
        image = memory_open(&memory);
        EXPECT(0, qcr_start(image, &error));
        fill(data, sizeof(data), 0, 1);
        EXPECT(0, qcr_write(image, data, sizeof(data), MIB, &error));
        EXPECT(0, qcr_flush(image, &error));
        EXPECT(0, qcr_stop(image, &error));
        /* Unflushed when it happens. */
        EXPECT(0, qcr_write(image, data, sizeof(data), 2 * MIB, &error));

        if (deep) {
            EXPECT(0, qcr_test_panic_in_device(image, &error));
            EXPECT(-ENOTRECOVERABLE, qcr_write(image, data, 512, MIB, &error));
            CHECK(strstr(error.message, "in the device") != NULL);
        } else {
            EXPECT(-ENOTRECOVERABLE, qcr_test_panic(image, &error));
            CHECK(strstr(error.message, "on purpose") != NULL);
        }
        is_refused(image);

        length = memory.length;
        before = (unsigned char *)malloc((size_t)length);
        CHECK(before != NULL);
        memcpy(before, memory.bytes, (size_t)length);
        EXPECT(-ENOTRECOVERABLE, qcr_close(image, &error));
        EXPECT(-ENOTRECOVERABLE, qcr_close(image, &error));
        qcr_free(image);
        CHECK(memory.destroyed == 1);
        CHECK(memory.length == length && memcmp(before, memory.bytes, (size_t)length) == 0);
        free(before);

        /* Other images do not notice. */
        EXPECT(0, qcr_write(bystander, data, sizeof(data), 0, &error));
        EXPECT(0, qcr_flush(bystander, &error));

        memory.destroyed = 0;
        image = memory_open(&memory);
        EXPECT(0, qcr_read(image, back, sizeof(back), MIB, &error));
        CHECK(memcmp(data, back, sizeof(back)) == 0);
        EXPECT(0, qcr_close(image, &error));
        qcr_free(image);
        callbacks = memory_callbacks(&memory);
        memory.destroyed = 0;
        EXPECT(0, qcr_check_callbacks(&callbacks, QCR_REPAIR_NONE, NULL, NULL, &report, &error));
        CHECK(report.corruptions == 0 && report.leaks == 0);
        memory_free(&memory);
    }
    qcr_free(bystander);
    memory_free(&other);
    return 0;
}
