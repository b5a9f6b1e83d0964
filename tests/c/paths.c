/* Images in files: made, refused, replaced, locked, backed, resized, described. The argument is an empty directory. */
#include "harness.h"

#include <sys/stat.h>

static struct qcr_error error;
static char image_path[4096], base_path[4096];

static void expect_extent(struct qcr_image *image, uint64_t offset, uint32_t kind, uint64_t length)
{
    struct qcr_extent extent;
    QCR_INIT(extent);
    EXPECT(0, qcr_get_extent(image, offset, 64 * MIB - offset, &extent, &error));
    CHECK(extent.kind == kind && extent.length == length);
    CHECK((extent.host_offset != 0) == (kind == QCR_EXTENT_DATA));
}

static void count(void *user, const char *line)
{
    CHECK(line[0] != 0);
    ++*(int *)user;
}

int main(int argc, char **argv)
{
    struct qcr_create_options create;
    struct qcr_options options;
    struct qcr_extent extent;
    struct qcr_info info;
    struct qcr_check_report report;
    struct qcr_commit_report committed;
    struct qcr_image *image = NULL, *other = NULL;
    struct stat status;
    unsigned char data[1024], back[1024];
    int findings = 0;

    CHECK(argc == 2);
    snprintf(image_path, sizeof(image_path), "%s/image.qcow2", argv[1]);
    snprintf(base_path, sizeof(base_path), "%s/base.qcow2", argv[1]);
    QCR_INIT(error);
    QCR_INIT(create);
    QCR_INIT(extent);
    QCR_INIT(info);
    QCR_INIT(report);
    QCR_INIT(options);
    EXPECT(0, qcr_options_init(&options, &error));

    /* An unusable option leaves no file. */
    create.virtual_size = 64 * MIB;
    create.cluster_size = 3;
    EXPECT(-EINVAL, qcr_create_path(image_path, &create, &error));
    CHECK(strcmp(error.field, "cluster_size") == 0);
    CHECK(stat(image_path, &status) == -1 && errno == ENOENT);

    create.cluster_size = 4096;
    create.refcount_bits = 1;
    create.flags = QCR_CREATE_LAZY_REFCOUNTS;
    EXPECT(0, qcr_create_path(base_path, &create, &error));
    EXPECT(-EEXIST, qcr_create_path(base_path, &create, &error));

    /* What was asked for is what is there. */
    EXPECT(0, qcr_open_path(base_path, NULL, NULL, &image, &error));
    EXPECT(0, qcr_get_info(image, &info, &error));
    CHECK(info.version == 3 && info.virtual_size == 64 * MIB && info.cluster_size == 4096 && info.refcount_bits == 1);
    CHECK(info.flags == QCR_INFO_LAZY_REFCOUNTS && info.snapshots == 0 && info.backing_file[0] == 0);
    EXPECT(0, qcr_get_pinned(image, count, &findings, &error));
    CHECK((uint32_t)findings == info.pinned);
    memset(data, 0x11, sizeof(data));
    EXPECT(0, qcr_write(image, data, sizeof(data), 8192, &error));

    /* One user at a time; that includes replacing and repairing it. */
    EXPECT(-EAGAIN, qcr_open_path(base_path, NULL, NULL, &other, &error));
    create.flags = QCR_CREATE_REPLACE;
    EXPECT(-EAGAIN, qcr_create_path(base_path, &create, &error));
    EXPECT(-EAGAIN, qcr_check_path(base_path, QCR_REPAIR_ALL, NULL, NULL, &report, &error));
    CHECK(other == NULL);
    EXPECT(0, qcr_close(image, &error));
    qcr_free(image);
    image = NULL;

    /* Replacing makes a new image of it, or a file where none was. */
    EXPECT(0, qcr_create_path(image_path, &create, &error));
    create.virtual_size = 32 * MIB;
    EXPECT(0, qcr_create_path(image_path, &create, &error));
    EXPECT(0, qcr_check_path(image_path, QCR_REPAIR_NONE, count, &findings, &report, &error));
    CHECK(report.corruptions == 0 && report.leaks == 0 && report.total_clusters == 32 * MIB / 4096);

    /* Clusters in parts: of one that was written to in part, only that part is there. */
    create.virtual_size = 64 * MIB;
    create.flags = QCR_CREATE_REPLACE | QCR_CREATE_EXTENDED_L2;
    EXPECT(-EINVAL, qcr_create_path(image_path, &create, &error));
    CHECK(strcmp(error.field, "extended_l2") == 0);
    create.cluster_size = 65536;
    EXPECT(0, qcr_create_path(image_path, &create, &error));
    EXPECT(0, qcr_open_path(image_path, NULL, NULL, &image, &error));
    EXPECT(0, qcr_get_info(image, &info, &error));
    CHECK(info.flags == QCR_INFO_EXTENDED_L2 && info.cluster_size == 65536);
    EXPECT(0, qcr_write(image, data, 512, 4096, &error));
    expect_extent(image, 4096, QCR_EXTENT_DATA, 2048);
    EXPECT(0, qcr_close(image, &error));
    qcr_free(image);
    image = NULL;
    create.flags = QCR_CREATE_REPLACE;
    create.cluster_size = 4096;

    /* A backing file, named relative to the image, of the same size. */
    create.refcount_bits = 0;
    create.backing_file = "base.qcow2";
    create.backing_format = "qcow2";
    EXPECT(0, qcr_create_path(image_path, &create, &error));
    EXPECT(-EPERM, qcr_open_path(image_path, NULL, NULL, &image, &error));
    CHECK(image == NULL);
    options.backing = QCR_BACKING_ALLOW;
    EXPECT(0, qcr_open_path(image_path, &options, NULL, &image, &error));
    EXPECT(0, qcr_get_info(image, &info, &error));
    CHECK(strcmp(info.backing_file, "base.qcow2") == 0 && strcmp(info.backing_format, "qcow2") == 0);
    EXPECT(0, qcr_read(image, back, sizeof(back), 8192, &error));
    CHECK(memcmp(data, back, sizeof(data)) == 0);
    expect_extent(image, 0, QCR_EXTENT_UNALLOCATED, 64 * MIB);
    EXPECT(0, qcr_write(image, data, sizeof(data), 0, &error));
    EXPECT(0, qcr_write_zeroes(image, 4096, 8192, 0, &error));
    expect_extent(image, 0, QCR_EXTENT_DATA, 4096);
    expect_extent(image, 12288, QCR_EXTENT_UNALLOCATED, 64 * MIB - 12288);
    EXPECT(0, qcr_read(image, back, sizeof(back), 8192, &error));
    memset(data, 0, sizeof(data));
    CHECK(memcmp(data, back, sizeof(data)) == 0);
    EXPECT(-EINVAL, qcr_get_extent(image, 0, 0, &extent, &error));
    CHECK(strcmp(error.field, "length") == 0);

    /* Smaller only when asked for. */
    EXPECT(-EINVAL, qcr_resize(image, 16 * MIB, 0, &error));
    EXPECT(0, qcr_resize(image, 128 * MIB, 0, &error));
    EXPECT(0, qcr_resize(image, 16 * MIB, QCR_RESIZE_SHRINK, &error));
    EXPECT(-EINVAL, qcr_read(image, back, sizeof(back), 16 * MIB, &error));
    EXPECT(0, qcr_close(image, &error));
    qcr_free(image);

    /* Without discards; read-only; without the backing file's contents. */
    options.flags = 0;
    options.backing = QCR_BACKING_SKIP;
    EXPECT(0, qcr_open_path(image_path, &options, NULL, &image, &error));
    EXPECT(-EOPNOTSUPP, qcr_discard(image, 0, 4096, &error));
    CHECK(qcr_read(image, back, sizeof(back), MIB, &error) < 0);
    EXPECT(0, qcr_read(image, back, sizeof(back), 0, &error));
    qcr_free(image);
    options.flags = QCR_READ_ONLY | QCR_DISCARD | QCR_CHECK_ON_CONNECT;
    options.backing_directory = argv[1];
    options.backing = QCR_BACKING_ALLOW;
    EXPECT(0, qcr_open_path(image_path, &options, NULL, &image, &error));
    EXPECT(0, qcr_get_info(image, &info, &error));
    CHECK(info.flags == QCR_INFO_READ_ONLY && info.virtual_size == 16 * MIB);
    EXPECT(-EROFS, qcr_discard(image, 0, 4096, &error));
    EXPECT(-EROFS, qcr_compact(image, NULL, NULL, NULL, &error));
    qcr_free(image);

    EXPECT(0, qcr_check_path(image_path, QCR_REPAIR_ALL, NULL, NULL, &report, &error));
    CHECK(report.corruptions == 0 && report.leaks == 0);

    /* Into the backing file, which must be allowed and has none itself. */
    EXPECT(-EINVAL, qcr_commit_path(image_path, NULL, NULL, &error));
    CHECK(strcmp(error.field, "backing") == 0);
    QCR_INIT(committed);
    options.flags = QCR_DISCARD;
    EXPECT(0, qcr_commit_path(image_path, &options, &committed, &error));
    CHECK(committed.written == 4096 && committed.zeroed == 8192);
    EXPECT(-EINVAL, qcr_commit_path(base_path, &options, NULL, &error));
    EXPECT(0, qcr_open_path(image_path, &options, NULL, &image, &error));
    EXPECT(0, qcr_get_extent(image, 0, 16 * MIB, &extent, &error));
    CHECK(extent.kind == QCR_EXTENT_UNALLOCATED && extent.length == 16 * MIB);
    EXPECT(0, qcr_read(image, back, sizeof(back), 0, &error));
    memset(data, 0x11, sizeof(data));
    CHECK(memcmp(data, back, sizeof(data)) == 0);
    qcr_free(image);

    /* Of version 3 it is already. */
    EXPECT(0, qcr_upgrade_path(image_path, &error));
    EXPECT(0, qcr_check_path(image_path, QCR_REPAIR_NONE, NULL, NULL, &report, &error));
    CHECK(report.corruptions == 0 && report.leaks == 0);
    return 0;
}
