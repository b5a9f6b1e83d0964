/* `destroy` of block callbacks and of log callbacks comes exactly once, however a call ends, and nothing is called
 * after it.
 */
#include "harness.h"

static struct qcr_error error;

struct sink {
    int messages;
    int destroyed;
};

static void log_line(void *user, uint32_t level, const char *message)
{
    struct sink *sink = (struct sink *)user;
    CHECK(sink->destroyed == 0 && level >= QCR_LOG_ERROR && level <= QCR_LOG_DEBUG && message[0] != 0);
    __sync_fetch_and_add(&sink->messages, 1);
}

static void log_destroyed(void *user)
{
    __sync_fetch_and_add(&((struct sink *)user)->destroyed, 1);
}

static struct memory memory;
static struct sink sink;
static struct qcr_log logs;
static struct qcr_options options;

static void again(void)
{
    memory.destroyed = 0;
    memory.left = -1;
    memory.failure = -EIO;
    memset(&sink, 0, sizeof(sink));
    QCR_INIT(logs);
    logs.level = QCR_LOG_DEBUG;
    logs.user = &sink;
    logs.destroy = log_destroyed;
    logs.log = log_line;
    QCR_INIT(options);
    CHECK(qcr_options_init(&options, NULL) == 0);
}

#define BOTH_GONE() CHECK(memory.destroyed == 1 && sink.destroyed == 1)

int main(void)
{
    struct qcr_block_callbacks callbacks;
    struct qcr_check_report report;
    struct qcr_image *image = NULL;
    struct qcr_error small;
    int calls;

    QCR_INIT(error);
    QCR_INIT(report);
    memory_init(&memory);
    callbacks = memory_callbacks(&memory);

    /* Refused before the device is asked anything. */
    again();
    EXPECT(-EINVAL, qcr_open_callbacks(&callbacks, NULL, &logs, NULL, &error));
    BOTH_GONE();
    again();
    options.struct_size = 3;
    EXPECT(-EINVAL, qcr_open_callbacks(&callbacks, &options, &logs, &image, &error));
    BOTH_GONE();
    again();
    options.backing = QCR_BACKING_ALLOW;
    EXPECT(-EINVAL, qcr_open_callbacks(&callbacks, &options, &logs, &image, &error));
    CHECK(strcmp(error.field, "backing_directory") == 0);
    BOTH_GONE();
    again();
    memset(&small, 0, sizeof(small));
    CHECK(qcr_open_callbacks(&callbacks, &options, &logs, &image, &small) == -EINVAL);
    BOTH_GONE();
    again();
    callbacks.length = NULL;
    EXPECT(-EINVAL, qcr_open_callbacks(&callbacks, &options, &logs, &image, &error));
    BOTH_GONE();
    callbacks = memory_callbacks(&memory);
    again();
    logs.log = NULL;
    EXPECT(-EINVAL, qcr_open_callbacks(&callbacks, &options, &logs, &image, &error));
    BOTH_GONE();
    again();
    logs.level = 17;
    EXPECT(-EINVAL, qcr_open_callbacks(&callbacks, &options, &logs, &image, &error));
    BOTH_GONE();
    again();
    EXPECT(-EINVAL, qcr_open_callbacks(NULL, &options, &logs, &image, &error));
    CHECK(sink.destroyed == 1);
    again();
    EXPECT(-EINVAL, qcr_open_path(NULL, &options, &logs, &image, &error));
    CHECK(sink.destroyed == 1);
    again();
    EXPECT(-ENOENT, qcr_open_path("/nonexistent/x", &options, &logs, &image, &error));
    CHECK(sink.destroyed == 1);

    /* Not an image. */
    CHECK(memory_truncate((again(), &memory), MIB) == 0);
    EXPECT(-EUCLEAN, qcr_open_callbacks(&callbacks, &options, &logs, &image, &error));
    BOTH_GONE();
    again();
    EXPECT(-EUCLEAN, qcr_check_callbacks(&callbacks, QCR_REPAIR_NONE, NULL, NULL, &report, &error));
    CHECK(memory.destroyed == 1);

    /* The device fails at its first call, its second, ... until everything works. Its own error arrives; a count, a
     * short transfer perhaps, counts as -EIO.
     */
    again();
    memory_create(&memory, 4 * MIB);
    for (calls = 0;; calls++) {
        int result;
        again();
        memory.left = calls;
        memory.failure = calls % 2 ? -ENODEV : 512;
        result = qcr_open_callbacks(&callbacks, &options, &logs, &image, &error);
        if (result == 0) {
            break;
        }
        CHECK(result == (calls % 2 ? -ENODEV : -EIO) && error.code == result);
        CHECK(image == NULL);
        BOTH_GONE();
    }
    CHECK(calls > 0);

    /* Closed, then freed. */
    memory.left = -1;
    CHECK(memory.destroyed == 0 && sink.destroyed == 0);
    EXPECT(0, qcr_close(image, &error));
    CHECK(memory.destroyed <= 1 && sink.destroyed <= 1);
    qcr_free(image);
    BOTH_GONE();

    /* Freed without closing, with the recycler running: what was written is there afterwards. */
    {
        unsigned char data[4096], back[4096];
        again();
        EXPECT(0, qcr_open_callbacks(&callbacks, &options, &logs, &image, &error));
        EXPECT(0, qcr_start(image, &error));
        fill(data, sizeof(data), 65536, 1);
        EXPECT(0, qcr_write(image, data, sizeof(data), 65536, &error));
        qcr_free(image);
        BOTH_GONE();

        again();
        options.flags |= QCR_READ_ONLY;
        callbacks.pwritev = NULL;
        callbacks.flush = NULL;
        EXPECT(0, qcr_open_callbacks(&callbacks, &options, &logs, &image, &error));
        EXPECT(0, qcr_read(image, back, sizeof(back), 65536, &error));
        CHECK(memcmp(data, back, sizeof(back)) == 0);
        EXPECT(-EROFS, qcr_write(image, data, sizeof(data), 0, &error));
        EXPECT(-EROFS, qcr_start(image, &error));
        qcr_free(image);
        BOTH_GONE();
    }

    /* A check gives the device back, and the image is in order. */
    again();
    callbacks = memory_callbacks(&memory);
    EXPECT(0, qcr_check_callbacks(&callbacks, QCR_REPAIR_NONE, NULL, NULL, &report, &error));
    CHECK(memory.destroyed == 1 && report.corruptions == 0 && report.leaks == 0 && report.total_clusters == 64);
    memory_free(&memory);
    return 0;
}
