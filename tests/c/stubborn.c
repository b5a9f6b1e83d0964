/* A device that is slow, answers out of order, fails with every errno there is, and is short of space for good: every
 * caller gets its own answer, nothing that was durable changes, and the image goes on when the device does.
 */
#include "harness.h"

#define CLUSTER 65536u
#define THREADS 6u

static struct qcr_error error;

/* Where guests work: every thread has clusters of its own. */
static struct qcr_image *image;
static unsigned rounds;

/* Another delay for every call, so that what was asked first is often answered last. */
static void dawdle(void *user)
{
    unsigned *calls = (unsigned *)user;
    const unsigned n = __sync_add_and_fetch(calls, 1);
    struct timespec time;
    time.tv_sec = 0;
    time.tv_nsec = (long)(n * 2654435761u >> 16) % (n % 23 == 0 ? 20000000 : 300000);
    nanosleep(&time, NULL);
}

static void *guest(void *argument)
{
    const unsigned self = *(const unsigned *)argument;
    static unsigned char data[THREADS][CLUSTER], back[THREADS][CLUSTER];
    struct qcr_error mine;
    unsigned round;
    QCR_INIT(mine);
    for (round = 1; round <= rounds; round++) {
        const uint64_t offset = ((uint64_t)(round % 7) * THREADS + self) * CLUSTER;
        fill(data[self], CLUSTER, offset, round);
        CHECK(qcr_write(image, data[self], CLUSTER, offset, &mine) == 0);
        CHECK(round % 4 != 0 || qcr_flush(image, &mine) == 0);
        CHECK(qcr_read(image, back[self], CLUSTER, offset, &mine) == 0);
        CHECK(memcmp(data[self], back[self], CLUSTER) == 0);
        if (round % 3 == 0) {
            CHECK(qcr_discard(image, offset, CLUSTER, &mine) == 0);
            CHECK(qcr_read(image, back[self], CLUSTER, offset, &mine) == 0);
            CHECK(back[self][0] == 0 && memcmp(back[self], back[self] + 1, CLUSTER - 1) == 0);
        }
    }
    return NULL;
}

static void sound(struct memory *memory)
{
    struct qcr_block_callbacks callbacks = memory_callbacks(memory);
    struct qcr_check_report report;
    QCR_INIT(report);
    memory->destroyed = 0;
    EXPECT(0, qcr_check_callbacks(&callbacks, QCR_REPAIR_NONE, NULL, NULL, &report, &error));
    CHECK(report.corruptions == 0 && report.leaks == 0 && memory->destroyed == 1);
    memory->destroyed = 0;
}

static struct qcr_image *open_busy(struct memory *memory)
{
    struct qcr_block_callbacks callbacks = memory_callbacks(memory);
    struct qcr_options options;
    struct qcr_image *opened = NULL;
    QCR_INIT(options);
    EXPECT(0, qcr_options_init(&options, &error));
    EXPECT(0, qcr_options_parse(&options, "keep_erased=512;compact_after_unmaps=256;settle_ms=1;flush_ms=5", &error));
    EXPECT(0, qcr_open_callbacks(&callbacks, &options, NULL, &opened, &error));
    EXPECT(0, qcr_start(opened, &error));
    return opened;
}

static void slow_and_out_of_order(void)
{
    struct memory memory;
    pthread_t threads[THREADS];
    unsigned numbers[THREADS], calls = 0, i;
    memory_init(&memory);
    memory_create(&memory, 8 * MIB);
    image = open_busy(&memory);
    memory.hook_user = &calls;
    memory.hook = dawdle;
    for (i = 0; i < THREADS; i++) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, guest, &numbers[i]) == 0);
    }
    for (i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    EXPECT(0, qcr_compact(image, NULL, NULL, NULL, &error));
    EXPECT(0, qcr_close(image, &error));
    qcr_free(image);
    memory.hook = NULL;
    CHECK(memory.destroyed == 1 && calls > 100);
    sound(&memory);
    memory_free(&memory);
}

/* The error arrives with its own value, at each kind of request; then the device works again. */
static void every_errno(void)
{
    struct memory memory;
    unsigned char data[2 * CLUSTER], back[2 * CLUSTER];
    int number;
    memory_init(&memory);
    memory_create(&memory, 16 * MIB);
    image = memory_open(&memory);
    fill(data, sizeof(data), 0, 1);
    EXPECT(0, qcr_write(image, data, sizeof(data), 0, &error));
    EXPECT(0, qcr_flush(image, &error));
    for (number = 1; number <= 133; number++) {
        if (number == 41 || number == 58) {
            /* No errno has these. */
            continue;
        }
        memory.failure = -number;
        memory.left = 0;
        EXPECT(-number, qcr_read(image, back, sizeof(back), 0, &error));
        EXPECT(-number, qcr_write(image, data, sizeof(data), 0, &error));
        /* Into clusters that are not there yet. */
        {
            const int result = qcr_write(image, data, sizeof(data), 2 * MIB, &error);
            CHECK(result == 0 || (result == -number && error.code == -number));
        }
        memory.left = -1;
        EXPECT(0, qcr_write(image, data, sizeof(data), 0, &error));
        EXPECT(0, qcr_read(image, back, sizeof(back), 0, &error));
        CHECK(memcmp(data, back, sizeof(back)) == 0);
        EXPECT(0, qcr_flush(image, &error));
    }
    EXPECT(0, qcr_close(image, &error));
    qcr_free(image);
    CHECK(memory.destroyed == 1);
    sound(&memory);
    memory_free(&memory);
}

/* A flush fails, with each errno: the handle takes no changes any more, reads go on, and what was flushed before is
 * there when the image is opened again.
 */
static int flush_failure;

static int failing_flush(void *user)
{
    return flush_failure != 0 ? flush_failure : memory_flush(user);
}

static void every_errno_of_flush(void)
{
    static const int numbers[] = {EIO, ENOSPC, EAGAIN, EINTR, ENODEV, ETIMEDOUT, EDQUOT, EROFS, ENOMEM, EOPNOTSUPP};
    struct memory memory;
    unsigned char data[CLUSTER], back[CLUSTER];
    size_t i;
    memory_init(&memory);
    memory_create(&memory, 4 * MIB);
    for (i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        struct qcr_block_callbacks callbacks = memory_callbacks(&memory);
        memory.destroyed = 0;
        callbacks.flush = failing_flush;
        flush_failure = 0;
        EXPECT(0, qcr_open_callbacks(&callbacks, NULL, NULL, &image, &error));
        fill(data, sizeof(data), 0, (unsigned)i);
        EXPECT(0, qcr_write(image, data, sizeof(data), 0, &error));
        EXPECT(0, qcr_flush(image, &error));
        flush_failure = -numbers[i];
        EXPECT(0, qcr_write(image, data, 512, 512, &error));
        CHECK(qcr_flush(image, &error) < 0);
        EXPECT(-EROFS, qcr_write(image, data, 512, 1024, &error));
        flush_failure = 0;
        EXPECT(-EROFS, qcr_flush(image, &error));
        EXPECT(0, qcr_read(image, back, 512, 0, &error));
        CHECK(memcmp(data, back, 512) == 0);
        CHECK(qcr_close(image, &error) < 0);
        qcr_free(image);
        CHECK(memory.destroyed == 1);

        memory.destroyed = 0;
        image = memory_open(&memory);
        EXPECT(0, qcr_read(image, back, 512, 0, &error));
        CHECK(memcmp(data, back, 512) == 0);
        EXPECT(0, qcr_close(image, &error));
        qcr_free(image);
    }
    sound(&memory);
    memory_free(&memory);
}

/* A store with a quota: what would grow past it fails, for good. */
static uint64_t quota;

static int truncate_within_quota(void *user, uint64_t length)
{
    return length > quota ? -ENOSPC : memory_truncate(user, length);
}

static void short_of_space(void)
{
    struct memory memory;
    struct qcr_block_callbacks callbacks;
    struct qcr_options options;
    unsigned char data[CLUSTER], back[CLUSTER];
    uint64_t at, stored, full;
    int result = 0, round;
    memory_init(&memory);
    memory_create(&memory, 64 * MIB);
    callbacks = memory_callbacks(&memory);
    callbacks.truncate = truncate_within_quota;
    quota = 8 * MIB;
    QCR_INIT(options);
    EXPECT(0, qcr_options_init(&options, &error));
    EXPECT(0, qcr_options_parse(&options, "keep_erased=256;compact_after_unmaps=128;settle_ms=1;flush_ms=2", &error));
    EXPECT(0, qcr_open_callbacks(&callbacks, &options, NULL, &image, &error));
    EXPECT(0, qcr_start(image, &error));
    for (stored = 0; result == 0; stored += CLUSTER) {
        fill(data, CLUSTER, stored, 1);
        result = qcr_write(image, data, CLUSTER, stored, &error);
    }
    CHECK(result == -ENOSPC && error.code == -ENOSPC);
    stored -= CLUSTER;
    CHECK(stored > 6 * MIB && memory.length <= quota);
    /* What is there can be read, written over, flushed. */
    EXPECT(0, qcr_flush(image, &error));
    for (at = 0; at < stored; at += CLUSTER) {
        fill(data, CLUSTER, at, 2);
        EXPECT(0, qcr_write(image, data, CLUSTER, at, &error));
    }
    EXPECT(0, qcr_flush(image, &error));
    /* The recycler may have had a few clusters in hand just now; they are soon gone. */
    for (full = 32 * MIB; (result = qcr_write(image, data, CLUSTER, full, &error)) == 0;) {
        full += CLUSTER;
    }
    CHECK(result == -ENOSPC && full < 34 * MIB);
    /* What the guest gives back it can have again, as soon as the recycler has made it ready. */
    EXPECT(0, qcr_discard(image, 0, 2 * MIB, &error));
    EXPECT(0, qcr_flush(image, &error));
    for (round = 0; round < 2000; round++) {
        fill(data, CLUSTER, full, 3);
        result = qcr_write(image, data, CLUSTER, full, &error);
        if (result != -ENOSPC) {
            break;
        }
        rest(5);
    }
    CHECK(result == 0);
    EXPECT(0, qcr_flush(image, &error));
    for (at = 2 * MIB; at < stored; at += CLUSTER) {
        fill(data, CLUSTER, at, 2);
        EXPECT(0, qcr_read(image, back, CLUSTER, at, &error));
        CHECK(memcmp(data, back, CLUSTER) == 0);
    }
    EXPECT(0, qcr_close(image, &error));
    qcr_free(image);
    CHECK(memory.destroyed == 1);
    sound(&memory);
    memory_free(&memory);
}

int main(int argc, char **argv)
{
    alarm(240);
    rounds = argc > 1 ? (unsigned)atoi(argv[1]) : 60;
    QCR_INIT(error);
    slow_and_out_of_order();
    every_errno();
    every_errno_of_flush();
    short_of_space();
    return 0;
}
