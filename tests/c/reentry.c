/* Callbacks call the library: a lock held meanwhile would show as a deadlock, which the alarm ends. */
#include "harness.h"

static struct qcr_error error;
static struct qcr_image *volatile first;
static struct qcr_image *second;
static int reentered;
static int lines;

static void look_at_both(void *user)
{
    struct qcr_stats stats;
    struct qcr_info info;
    struct qcr_image *own = first;
    unsigned char sector[512];
    size_t needed;
    (void)user;
    QCR_INIT(stats);
    QCR_INIT(info);
    if (own != NULL) {
        CHECK(qcr_get_stats(own, &stats, NULL) == 0 && stats.virtual_size == 4 * MIB);
        CHECK(qcr_get_info(own, &info, NULL) == 0 && info.virtual_size == 4 * MIB);
        CHECK(qcr_stats_prometheus(own, NULL, 0, &needed, NULL) == 0);
    }
    CHECK(qcr_write(second, memset(sector, 7, sizeof(sector)), sizeof(sector), 0, NULL) == 0);
    CHECK(qcr_read(second, sector, sizeof(sector), 0, NULL) == 0);
    CHECK(qcr_flush(second, NULL) == 0);
    __sync_fetch_and_add(&reentered, 1);
}

static void log_line(void *user, uint32_t level, const char *message)
{
    (void)level;
    (void)message;
    look_at_both(user);
    __sync_fetch_and_add(&lines, 1);
}

static int use_while_compacting(void *user, const struct qcr_progress *progress)
{
    unsigned char data[65536];
    CHECK(progress->struct_size == sizeof(*progress) && progress->done <= progress->total);
    ++*(int *)user;
    memset(data, 0x5a, sizeof(data));
    CHECK(qcr_write(first, data, sizeof(data), 3 * MIB, NULL) == 0);
    CHECK(qcr_read(first, data, 512, 3 * MIB, NULL) == 0 && data[511] == 0x5a);
    CHECK(qcr_discard(first, 3 * MIB, 65536, NULL) == 0);
    CHECK(qcr_flush(first, NULL) == 0);
    CHECK(qcr_pause(first, NULL) == 0 && qcr_resume(first, NULL) == 0);
    return 0;
}

static int cancel(void *user, const struct qcr_progress *progress)
{
    (void)progress;
    ++*(int *)user;
    return 1;
}

int main(void)
{
    struct memory one, two;
    struct qcr_block_callbacks callbacks;
    struct qcr_compact_report report;
    struct qcr_check_report check;
    struct qcr_options options;
    struct qcr_log log;
    struct qcr_image *image = NULL;
    unsigned char *data = (unsigned char *)malloc(2 * MIB);
    int calls = 0;

    alarm(120);
    CHECK(data != NULL);
    QCR_INIT(error);
    QCR_INIT(log);
    QCR_INIT(check);
    QCR_INIT(report);
    QCR_INIT(options);
    EXPECT(0, qcr_options_init(&options, &error));
    memory_init(&one);
    memory_init(&two);
    memory_create(&one, 4 * MIB);
    memory_create(&two, MIB);
    second = memory_open(&two);

    one.hook = look_at_both;
    callbacks = memory_callbacks(&one);
    log.level = QCR_LOG_DEBUG;
    log.log = log_line;
    options.flags |= QCR_RUNTIME_ASSERTS;
    EXPECT(0, qcr_open_callbacks(&callbacks, &options, &log, &image, &error));
    first = image;
    EXPECT(0, qcr_start(image, &error));
    fill(data, 2 * MIB, 0, 1);
    EXPECT(0, qcr_write(image, data, 2 * MIB, 0, &error));
    EXPECT(0, qcr_discard(image, 0, MIB, &error));
    EXPECT(0, qcr_flush(image, &error));

    /* Cancelled at once, then done. */
    EXPECT(-ECANCELED, qcr_compact(image, cancel, &calls, &report, &error));
    CHECK(calls == 1 && report.file_size_before == 0);
    calls = 0;
    EXPECT(0, qcr_compact(image, use_while_compacting, &calls, &report, &error));
    CHECK(calls > 0 && report.file_size_before > 0 && report.file_size_after < report.file_size_before);
    EXPECT(0, qcr_check(image, NULL, NULL, &check, &error));
    CHECK(check.corruptions == 0);
    EXPECT(0, qcr_read(image, data, MIB, MIB, &error));
    {
        unsigned char *want = (unsigned char *)malloc(2 * MIB);
        CHECK(want != NULL);
        fill(want, 2 * MIB, 0, 1);
        CHECK(memcmp(data, want + MIB, MIB) == 0);
        free(want);
    }
    EXPECT(0, qcr_stop(image, &error));
    EXPECT(0, qcr_close(image, &error));
    first = NULL;
    qcr_free(image);
    qcr_free(second);
    CHECK(reentered > 10 && one.destroyed == 1 && two.destroyed == 1);
    memory_free(&one);
    memory_free(&two);
    free(data);
    return 0;
}
