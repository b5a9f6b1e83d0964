/* Internal snapshots: made, listed, gone back to, deleted. The argument is an empty directory. */
#include "harness.h"

static struct qcr_error error;

struct listed {
    unsigned count;
    struct qcr_snapshot last;
};

static void list(void *user, const struct qcr_snapshot *snapshot)
{
    struct listed *listed = (struct listed *)user;
    CHECK(snapshot->struct_size == sizeof(*snapshot));
    listed->count++;
    listed->last = *snapshot;
}

static void hold(struct qcr_image *image, unsigned char byte)
{
    unsigned char data[4096];
    memset(data, byte, sizeof(data));
    EXPECT(0, qcr_write(image, data, sizeof(data), 0, &error));
}

static void holds(struct qcr_image *image, unsigned char byte)
{
    unsigned char data[4096];
    size_t i;
    EXPECT(0, qcr_read(image, data, sizeof(data), 0, &error));
    for (i = 0; i < sizeof(data); i++)
        CHECK(data[i] == byte);
}

int main(int argc, char **argv)
{
    char path[4096];
    struct qcr_create_options create;
    struct qcr_check_report report;
    struct qcr_snapshot made;
    struct qcr_image *image = NULL;
    struct qcr_info info;
    struct listed listed;

    CHECK(argc == 2);
    snprintf(path, sizeof(path), "%s/image.qcow2", argv[1]);
    QCR_INIT(error);
    QCR_INIT(create);
    QCR_INIT(report);
    QCR_INIT(made);
    QCR_INIT(info);
    create.virtual_size = 16 * MIB;
    create.cluster_size = 4096;
    EXPECT(0, qcr_create_path(path, &create, &error));
    EXPECT(0, qcr_open_path(path, NULL, NULL, &image, &error));

    hold(image, 1);
    EXPECT(0, qcr_create_snapshot(image, "first", &made, &error));
    CHECK(strcmp(made.id, "1") == 0 && strcmp(made.name, "first") == 0);
    CHECK(made.virtual_size == 16 * MIB && made.vm_state_size == 0 && made.seconds > 1000000000);
    hold(image, 2);
    EXPECT(0, qcr_create_snapshot(image, "second", NULL, &error));
    EXPECT(-EINVAL, qcr_create_snapshot(image, "first", NULL, &error));
    CHECK(strcmp(error.field, "snapshot") == 0);
    EXPECT(-EINVAL, qcr_create_snapshot(image, "2", NULL, &error));
    EXPECT(-EINVAL, qcr_create_snapshot(image, "", NULL, &error));
    hold(image, 3);

    memset(&listed, 0, sizeof(listed));
    EXPECT(0, qcr_get_snapshots(image, list, &listed, &error));
    CHECK(listed.count == 2 && strcmp(listed.last.id, "2") == 0 && strcmp(listed.last.name, "second") == 0);

    EXPECT(0, qcr_resize(image, 32 * MIB, 0, &error));
    EXPECT(0, qcr_apply_snapshot(image, "first", &error));
    holds(image, 1);
    EXPECT(0, qcr_get_info(image, &info, &error));
    CHECK(info.virtual_size == 16 * MIB && info.snapshots == 2);
    EXPECT(-EINVAL, qcr_apply_snapshot(image, "third", &error));
    EXPECT(0, qcr_apply_snapshot(image, "2", &error));
    holds(image, 2);
    EXPECT(0, qcr_delete_snapshot(image, "first", &error));
    EXPECT(-EINVAL, qcr_delete_snapshot(image, "first", &error));
    EXPECT(0, qcr_delete_snapshot(image, "second", &error));
    holds(image, 2);
    hold(image, 4);
    holds(image, 4);
    EXPECT(0, qcr_check(image, NULL, NULL, &report, &error));
    CHECK(report.corruptions == 0 && report.leaks == 0);
    EXPECT(0, qcr_close(image, &error));
    qcr_free(image);

    EXPECT(0, qcr_check_path(path, QCR_REPAIR_NONE, NULL, NULL, &report, &error));
    CHECK(report.corruptions == 0 && report.leaks == 0);
    return 0;
}
