/* Every function refuses NULL where it needs something, names it, and touches nothing. Nothing here needs an image:
 * a handle is NULL too, or a pointer is looked at before the image is.
 */
#include "harness.h"

static struct qcr_error error;

#define REFUSED(name, call)                      \
    do {                                         \
        EXPECT(-EINVAL, call);                   \
        CHECK(strcmp(error.field, name) == 0);   \
        CHECK(error.offset == -1);               \
    } while (0)

static int progress(void *user, const struct qcr_progress *at)
{
    (void)user;
    (void)at;
    return 0;
}

static void text(void *user, const char *line)
{
    (void)user;
    (void)line;
}

int main(void)
{
    struct qcr_options options;
    struct qcr_create_options create;
    struct qcr_block_callbacks callbacks;
    struct qcr_log log;
    struct qcr_extent extent;
    struct qcr_stats stats;
    struct qcr_info info;
    struct qcr_check_report check;
    struct qcr_compact_report compact;
    struct qcr_image *image = NULL;
    char buffer[512];
    struct iovec iov;
    size_t needed = 77;

    QCR_INIT(error);
    QCR_INIT(options);
    QCR_INIT(create);
    QCR_INIT(callbacks);
    QCR_INIT(log);
    QCR_INIT(extent);
    QCR_INIT(stats);
    QCR_INIT(info);
    QCR_INIT(check);
    QCR_INIT(compact);
    iov.iov_base = buffer;
    iov.iov_len = sizeof(buffer);

    CHECK(qcr_version() == (QCR_VERSION_MAJOR << 16 | QCR_VERSION_MINOR << 8 | QCR_VERSION_PATCH));
    CHECK(qcr_version_string() != NULL);

    REFUSED("options", qcr_options_init(NULL, &error));
    REFUSED("options", qcr_options_parse(NULL, "", &error));
    REFUSED("config", qcr_options_parse(&options, NULL, &error));

    create.virtual_size = 1 << 20;
    REFUSED("path", qcr_create_path(NULL, &create, &error));
    REFUSED("create_options", qcr_create_path("/nonexistent/x", NULL, &error));
    create.backing_file = "base";
    REFUSED("backing_format", qcr_create_path("/nonexistent/x", &create, &error));
    create.backing_file = NULL;
    create.backing_format = "raw";
    REFUSED("backing_file", qcr_create_path("/nonexistent/x", &create, &error));
    create.backing_format = NULL;
    REFUSED("callbacks", qcr_create_callbacks(NULL, &create, &error));
    REFUSED("preadv", qcr_create_callbacks(&callbacks, &create, &error));
    REFUSED("callbacks", qcr_create_callbacks_with_data(NULL, NULL, &create, &error));

    REFUSED("path", qcr_open_path(NULL, NULL, NULL, &image, &error));
    REFUSED("image", qcr_open_path("/nonexistent/x", NULL, NULL, NULL, &error));
    REFUSED("log", qcr_open_path("/nonexistent/x", NULL, &log, &image, &error));
    REFUSED("callbacks", qcr_open_callbacks(NULL, NULL, NULL, &image, &error));
    REFUSED("preadv", qcr_open_callbacks(&callbacks, NULL, NULL, &image, &error));
    callbacks.preadv = memory_preadv;
    REFUSED("length", qcr_open_callbacks(&callbacks, NULL, NULL, &image, &error));
    callbacks.length = memory_length;
    REFUSED("pwritev", qcr_open_callbacks(&callbacks, NULL, NULL, &image, &error));
    callbacks.pwritev = memory_pwritev;
    REFUSED("flush", qcr_open_callbacks(&callbacks, NULL, NULL, &image, &error));
    REFUSED("image", qcr_open_callbacks(&callbacks, NULL, NULL, NULL, &error));
    REFUSED("callbacks", qcr_open_callbacks_with_data(&callbacks, NULL, NULL, NULL, &image, &error));
    CHECK(image == NULL);

    REFUSED("image", qcr_close(NULL, &error));
    qcr_free(NULL);

    REFUSED("image", qcr_readv(NULL, &iov, 1, 0, &error));
    REFUSED("image", qcr_writev(NULL, &iov, 1, 0, &error));
    REFUSED("image", qcr_read(NULL, buffer, sizeof(buffer), 0, &error));
    REFUSED("image", qcr_write(NULL, buffer, sizeof(buffer), 0, &error));
    REFUSED("image", qcr_discard(NULL, 0, 512, &error));
    REFUSED("image", qcr_write_zeroes(NULL, 0, 512, 0, &error));
    REFUSED("image", qcr_flush(NULL, &error));
    REFUSED("image", qcr_resize(NULL, 1024, 0, &error));
    REFUSED("image", qcr_get_extent(NULL, 0, 512, &extent, &error));

    REFUSED("image", qcr_queue_create(NULL, NULL, NULL, &error));
    REFUSED("queue", qcr_queue_readv(NULL, &iov, 1, 0, 0, &error));
    REFUSED("queue", qcr_queue_writev(NULL, &iov, 1, 0, 0, &error));
    REFUSED("queue", qcr_queue_read(NULL, buffer, sizeof(buffer), 0, 0, &error));
    REFUSED("queue", qcr_queue_write(NULL, buffer, sizeof(buffer), 0, 0, &error));
    REFUSED("queue", qcr_queue_discard(NULL, 0, 512, 0, &error));
    REFUSED("queue", qcr_queue_write_zeroes(NULL, 0, 512, 0, 0, &error));
    REFUSED("queue", qcr_queue_flush(NULL, 0, &error));
    REFUSED("queue", qcr_queue_kick(NULL, &error));
    REFUSED("queue", qcr_queue_reap(NULL, NULL, 0, 0, 0, &needed, &error));
    REFUSED("queue", qcr_queue_failure(NULL, &error));
    REFUSED("queue", qcr_queue_eventfd(NULL, NULL, &error));
    REFUSED("queue", qcr_queue_arm(NULL, &needed, &error));
    REFUSED("queue", qcr_queue_get_info(NULL, NULL, &error));
    qcr_queue_free(NULL);
    qcr_io_complete(NULL, 0);

    REFUSED("image", qcr_start(NULL, &error));
    REFUSED("image", qcr_pause(NULL, &error));
    REFUSED("image", qcr_resume(NULL, &error));
    REFUSED("image", qcr_stop(NULL, &error));
    REFUSED("image", qcr_compact(NULL, progress, NULL, &compact, &error));
    REFUSED("image", qcr_compress(NULL, progress, NULL, NULL, &error));
    REFUSED("image", qcr_write_compressed(NULL, buffer, sizeof(buffer), 0, &error));

    REFUSED("image", qcr_get_stats(NULL, &stats, &error));
    REFUSED("image", qcr_stats_prometheus(NULL, buffer, sizeof(buffer), &needed, &error));
    REFUSED("image", qcr_get_info(NULL, &info, &error));
    REFUSED("image", qcr_get_pinned(NULL, text, NULL, &error));
    REFUSED("image", qcr_check(NULL, text, NULL, &check, &error));
    REFUSED("path", qcr_check_path(NULL, QCR_REPAIR_NONE, text, NULL, &check, &error));
    REFUSED("report", qcr_check_path("/nonexistent/x", QCR_REPAIR_NONE, text, NULL, NULL, &error));
    REFUSED("image", qcr_get_bitmaps(NULL, NULL, NULL, &error));
    REFUSED("image", qcr_add_bitmap(NULL, "b", 0, 0, &error));
    REFUSED("image", qcr_remove_bitmap(NULL, "b", &error));
    REFUSED("image", qcr_clear_bitmap(NULL, "b", &error));
    REFUSED("image", qcr_record_bitmap(NULL, "b", 1, &error));
    REFUSED("image", qcr_merge_bitmap(NULL, "b", "c", &error));
    REFUSED("image", qcr_next_dirty(NULL, "b", 0, NULL, &error));
    REFUSED("image", qcr_get_snapshots(NULL, NULL, NULL, &error));
    REFUSED("image", qcr_create_snapshot(NULL, "s", NULL, &error));
    REFUSED("image", qcr_delete_snapshot(NULL, "s", &error));
    REFUSED("image", qcr_apply_snapshot(NULL, "s", &error));
    REFUSED("path", qcr_commit_path(NULL, NULL, NULL, &error));
    REFUSED("path", qcr_upgrade_path(NULL, &error));
    REFUSED("callbacks", qcr_check_callbacks(NULL, QCR_REPAIR_NONE, text, NULL, &check, &error));
    REFUSED("report", qcr_check_callbacks(&callbacks, QCR_REPAIR_NONE, text, NULL, NULL, &error));
    CHECK(needed == 77);

    /* No details wanted: the code alone. */
    CHECK(qcr_options_init(NULL, NULL) == -EINVAL);
    CHECK(qcr_close(NULL, NULL) == -EINVAL);
    return 0;
}
