/* Images whose guest data is in an external data file: in a directory, and on two devices of the program's. */
#include "harness.h"

#include <sys/stat.h>

#define SIZE (8 * MIB)

static struct qcr_error error;
static struct qcr_info info;
static char image_path[4096], data_path[4096];
static unsigned char data[65536], back[65536];

/* What is the same on every device. */
static void use(struct qcr_image *image)
{
    struct qcr_extent extent;
    QCR_INIT(extent);
    QCR_INIT(info);
    EXPECT(0, qcr_get_info(image, &info, &error));
    CHECK(info.flags == (QCR_INFO_DATA_FILE | QCR_INFO_RAW_DATA_FILE) && strcmp(info.data_file, "data.raw") == 0);
    CHECK(info.pinned == 1);
    fill(data, sizeof(data), 0, 1);
    EXPECT(0, qcr_write(image, data, sizeof(data), 0, &error));
    EXPECT(0, qcr_write(image, data, sizeof(data), MIB, &error));
    EXPECT(0, qcr_discard(image, 0, 65536, &error));
    EXPECT(0, qcr_flush(image, &error));
    EXPECT(0, qcr_get_extent(image, MIB, 65536, &extent, &error));
    CHECK(extent.kind == QCR_EXTENT_DATA && extent.host_offset == MIB);
    EXPECT(0, qcr_read(image, back, sizeof(back), MIB, &error));
    CHECK(memcmp(data, back, sizeof(data)) == 0);
    EXPECT(0, qcr_compact(image, NULL, NULL, NULL, &error));
    EXPECT(0, qcr_close(image, &error));
}

static void in_files(const char *directory)
{
    struct qcr_create_options create;
    struct qcr_options options;
    struct qcr_check_report report;
    struct qcr_image *image = NULL;
    struct stat status;
    FILE *file;

    snprintf(image_path, sizeof(image_path), "%s/image.qcow2", directory);
    snprintf(data_path, sizeof(data_path), "%s/data.raw", directory);
    QCR_INIT(create);
    QCR_INIT(options);
    QCR_INIT(report);
    create.virtual_size = SIZE;

    /* Raw, without a name; a version that has none; a name that is taken: no file is left. */
    create.flags = QCR_CREATE_DATA_FILE_RAW;
    EXPECT(-EINVAL, qcr_create_path(image_path, &create, &error));
    CHECK(strcmp(error.field, "data_file") == 0);
    create.data_file = "data.raw";
    create.version = 2;
    EXPECT(-EINVAL, qcr_create_path(image_path, &create, &error));
    create.version = 0;
    create.data_file = "image.qcow2";
    EXPECT(-EINVAL, qcr_create_path(image_path, &create, &error));
    CHECK(stat(image_path, &status) == -1 && stat(data_path, &status) == -1);
    create.data_file = "data.raw";
    EXPECT(0, qcr_create_path(image_path, &create, &error));
    CHECK(stat(data_path, &status) == 0 && status.st_size == (off_t)SIZE);
    EXPECT(-EEXIST, qcr_create_path(image_path, &create, &error));
    create.flags |= QCR_CREATE_REPLACE;
    EXPECT(0, qcr_create_path(image_path, &create, &error));

    /* Only by permission. */
    EXPECT(0, qcr_options_init(&options, &error));
    CHECK(options.data_file == QCR_DATA_FILE_REFUSE);
    EXPECT(-EPERM, qcr_open_path(image_path, &options, NULL, &image, &error));
    options.data_file = 7;
    EXPECT(-EINVAL, qcr_open_path(image_path, &options, NULL, &image, &error));
    CHECK(strcmp(error.field, "data_file") == 0 && image == NULL);
    options.data_file = QCR_DATA_FILE_SKIP;
    EXPECT(0, qcr_open_path(image_path, &options, NULL, &image, &error));
    EXPECT(-EPERM, qcr_write(image, data, sizeof(data), 0, &error));
    EXPECT(0, qcr_compact(image, NULL, NULL, NULL, &error));
    EXPECT(0, qcr_close(image, &error));
    qcr_free(image);
    options.data_file = QCR_DATA_FILE_ALLOW;
    EXPECT(0, qcr_open_path(image_path, &options, NULL, &image, &error));
    use(image);
    qcr_free(image);
    EXPECT(0, qcr_check_path(image_path, QCR_REPAIR_NONE, NULL, NULL, &report, &error));
    CHECK(report.corruptions == 0 && report.leaks == 0);

    /* It is the disk. */
    file = fopen(data_path, "rb");
    CHECK(file != NULL && fseek(file, (long)MIB, SEEK_SET) == 0);
    CHECK(fread(back, 1, sizeof(back), file) == sizeof(back) && memcmp(data, back, sizeof(data)) == 0);
    fclose(file);
}

static void on_devices(void)
{
    struct qcr_block_callbacks callbacks, second;
    struct qcr_create_options create;
    struct qcr_image *image = NULL;
    struct memory memory, other;
    size_t i;

    memory_init(&memory);
    memory_init(&other);
    callbacks = memory_callbacks(&memory);
    second = memory_callbacks(&other);
    QCR_INIT(create);
    create.virtual_size = SIZE;
    create.flags = QCR_CREATE_DATA_FILE_RAW;
    create.data_file = "data.raw";

    /* Not without the second device, whose `destroy` runs, too. */
    EXPECT(-EINVAL, qcr_create_callbacks(&callbacks, &create, &error));
    CHECK(memory.destroyed == 1);
    memory.destroyed = 0;
    EXPECT(0, qcr_create_callbacks_with_data(&callbacks, &second, &create, &error));
    CHECK(memory.destroyed == 1 && other.destroyed == 1 && other.length == SIZE);
    memory.destroyed = other.destroyed = 0;
    EXPECT(-EPERM, qcr_open_callbacks(&callbacks, NULL, NULL, &image, &error));
    CHECK(memory.destroyed == 1 && image == NULL);
    memory.destroyed = 0;
    EXPECT(0, qcr_open_callbacks_with_data(&callbacks, &second, NULL, NULL, &image, &error));
    use(image);
    qcr_free(image);
    CHECK(memory.destroyed == 1 && other.destroyed == 1);
    CHECK(memcmp(other.bytes + MIB, data, sizeof(data)) == 0);
    for (i = 0; i < 65536; i++) {
        CHECK(other.bytes[i] == 0);
    }

    /* Errors of the second device arrive. */
    memory.destroyed = other.destroyed = 0;
    EXPECT(0, qcr_open_callbacks_with_data(&callbacks, &second, NULL, NULL, &image, &error));
    EXPECT(0, qcr_read(image, back, 512, 0, &error));
    other.left = 0;
    EXPECT(-EIO, qcr_read(image, back, 512, MIB, &error));
    EXPECT(-EIO, qcr_write(image, data, 512, MIB, &error));
    EXPECT(-EIO, qcr_flush(image, &error));
    EXPECT(-EROFS, qcr_write(image, data, 512, MIB, &error));
    other.left = -1;
    qcr_free(image);
    CHECK(memory.destroyed == 1 && other.destroyed == 1);
    memory_free(&memory);
    memory_free(&other);
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    QCR_INIT(error);
    in_files(argv[1]);
    on_devices();
    return 0;
}
