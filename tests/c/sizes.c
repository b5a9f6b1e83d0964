/* The rules of struct_size, flags and reserved members. */
#include "harness.h"

#include <stddef.h>

static struct qcr_error error;

/* A struct as a newer program has it. */
struct newer_options {
    struct qcr_options known;
    uint64_t later;
};

struct newer_error {
    struct qcr_error known;
    uint64_t later;
};

int main(void)
{
    struct qcr_options options;
    struct newer_options newer;
    struct newer_error newer_details;
    struct qcr_check_report report;
    struct qcr_create_options create;
    struct memory memory;
    struct qcr_block_callbacks callbacks;
    struct qcr_error small;
    struct qcr_image *image = NULL;

    QCR_INIT(error);

    /* Too small, or not set at all. */
    memset(&options, 0, sizeof(options));
    EXPECT(-EINVAL, qcr_options_init(&options, &error));
    CHECK(strcmp(error.field, "options") == 0);
    options.struct_size = offsetof(struct qcr_options, data_file) - 1;
    EXPECT(-EINVAL, qcr_options_init(&options, &error));
    options.struct_size = 1 << 20;
    EXPECT(-E2BIG, qcr_options_init(&options, &error));

    /* The defaults, and that nothing but the members is written. */
    memset(&newer, 0xee, sizeof(newer));
    newer.known.struct_size = sizeof(newer.known);
    EXPECT(0, qcr_options_init(&newer.known, &error));
    CHECK(newer.later == UINT64_C(0xeeeeeeeeeeeeeeee));
    CHECK(newer.known.flags == (QCR_DISCARD | QCR_PUNCH_JUNK) && newer.known.backing == QCR_BACKING_REFUSE);
    CHECK(newer.known.backing_directory == NULL && newer.known.id[0] == 0 && newer.known.keep_erased > 0);
    CHECK(newer.known.struct_size == sizeof(newer.known));

    /* What a newer program has beyond becomes zero in results. */
    newer.known.struct_size = sizeof(newer);
    EXPECT(0, qcr_options_init(&newer.known, &error));
    CHECK(newer.later == 0 && newer.known.struct_size == sizeof(newer));

    /* And in arguments may be zero, but nothing else. */
    EXPECT(0, qcr_options_parse(&newer.known, "read_only=1;id=abc;keep_erased=3;compact_after_unmaps=0;", &error));
    CHECK(newer.known.flags == (QCR_DISCARD | QCR_PUNCH_JUNK | QCR_READ_ONLY) && strcmp(newer.known.id, "abc") == 0);
    CHECK(newer.known.keep_erased == 1536 && newer.known.compact_after_unmaps == 0);
    newer.later = 1;
    EXPECT(-E2BIG, qcr_options_parse(&newer.known, "read_only=0", &error));
    CHECK(newer.known.flags == (QCR_DISCARD | QCR_PUNCH_JUNK | QCR_READ_ONLY));

    /* Unknown bits, reserved members and impossible texts. */
    QCR_INIT(options);
    EXPECT(0, qcr_options_init(&options, &error));
    options.flags |= 0x80000000u;
    EXPECT(-EINVAL, qcr_options_parse(&options, "", &error));
    CHECK(strcmp(error.field, "flags") == 0);
    options.flags &= 0x7fffffffu;
    options.backing_format = 3;
    EXPECT(-EINVAL, qcr_options_parse(&options, "", &error));
    CHECK(strcmp(error.field, "backing_format") == 0);
    options.backing_format = QCR_FORMAT_QCOW2;
    memset(options.id, 'x', sizeof(options.id));
    EXPECT(-EINVAL, qcr_options_parse(&options, "", &error));
    CHECK(strcmp(error.field, "id") == 0);
    options.id[0] = '\xff';
    options.id[1] = 0;
    EXPECT(-EINVAL, qcr_options_parse(&options, "", &error));
    CHECK(strcmp(error.field, "id") == 0);
    options.id[0] = 0;
    EXPECT(-EINVAL, qcr_options_parse(&options, "nonsense=1", &error));
    CHECK(strcmp(error.field, "nonsense") == 0);
    EXPECT(-EINVAL, qcr_options_parse(&options, "id=\xff", &error));
    CHECK(strcmp(error.field, "config") == 0);
    EXPECT(-EINVAL, qcr_options_parse(
        &options, "read_only=1;id=0123456789012345678901234567890123456789012345678901234567890123", &error));
    CHECK(strcmp(error.field, "id") == 0 && (options.flags & QCR_READ_ONLY) == 0);
    EXPECT(0,
           qcr_options_parse(&options, "id=012345678901234567890123456789012345678901234567890123456789012", &error));
    CHECK(strlen(options.id) == 63);
    options.backing = 9;
    EXPECT(-EINVAL, qcr_open_path("/nonexistent/x", &options, NULL, &image, &error));
    CHECK(strcmp(error.field, "backing") == 0);
    options.backing = QCR_BACKING_ALLOW;
    EXPECT(-ENOENT, qcr_open_path("/nonexistent/x", &options, NULL, &image, &error));
    CHECK(image == NULL);

    /* The details themselves: too small a struct is an error of its own, and the call does nothing. */
    memset(&small, 0xee, sizeof(small));
    small.struct_size = 16;
    QCR_INIT(options);
    CHECK(qcr_options_init(&options, &small) == -EINVAL);
    CHECK(options.flags == 0 && small.code == (int32_t)0xeeeeeeee);
    memset(&newer_details, 0xee, sizeof(newer_details));
    newer_details.known.struct_size = sizeof(newer_details);
    CHECK(qcr_options_init(NULL, &newer_details.known) == -EINVAL);
    CHECK(newer_details.known.code == -EINVAL && newer_details.later == 0);
    /* Success leaves them alone. */
    CHECK(qcr_options_init(&options, &newer_details.known) == 0);
    CHECK(newer_details.known.code == -EINVAL);

    /* Of callbacks; `destroy` runs as soon as the struct reaches so far. */
    QCR_INIT(create);
    create.virtual_size = MIB;
    memory_init(&memory);
    callbacks = memory_callbacks(&memory);
    callbacks.struct_size = 16;
    EXPECT(-EINVAL, qcr_create_callbacks(&callbacks, &create, &error));
    CHECK(memory.destroyed == 0);
    callbacks.struct_size = 24;
    EXPECT(-EINVAL, qcr_create_callbacks(&callbacks, &create, &error));
    CHECK(memory.destroyed == 1);
    memory.destroyed = 0;
    callbacks = memory_callbacks(&memory);
    callbacks.flags = 1;
    EXPECT(-EINVAL, qcr_create_callbacks(&callbacks, &create, &error));
    CHECK(memory.destroyed == 1 && strcmp(error.field, "flags") == 0);
    memory.destroyed = 0;

    /* Of the options of creation. */
    callbacks = memory_callbacks(&memory);
    create.flags = 0x10;
    EXPECT(-EINVAL, qcr_create_callbacks(&callbacks, &create, &error));
    create.flags = QCR_CREATE_REPLACE;
    EXPECT(-EINVAL, qcr_create_callbacks(&callbacks, &create, &error));
    CHECK(memory.destroyed == 2 && memory.length == 0);
    memory.destroyed = 0;

    /* A result must be able to take what there is before anything is done. */
    QCR_INIT(report);
    report.struct_size = 8;
    EXPECT(-EINVAL, qcr_check_callbacks(&callbacks, QCR_REPAIR_NONE, NULL, NULL, &report, &error));
    CHECK(memory.destroyed == 1 && strcmp(error.field, "report") == 0);
    memory.destroyed = 0;
    EXPECT(-EINVAL, qcr_check_callbacks(&callbacks, 7, NULL, NULL, &report, &error));
    CHECK(memory.destroyed == 1 && strcmp(error.field, "repair") == 0);
    memory_free(&memory);
    return 0;
}
