/* A qcow2 image in a file on the host: made, used, compacted and checked.
 *
 *     cc host_file.c $(pkg-config --cflags --libs qcowrecycle) -o host_file
 *     ./host_file new.qcow2
 *
 * SPDX-License-Identifier: Apache-2.0 OR MIT
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <qcowrecycle.h>

#define MIB (1024u * 1024u)

static struct qcr_error error;

/* Every function returns 0 or a negative errno, and then has filled `error`. */
static void must(const char *what, int result)
{
    if (result < 0) {
        fprintf(stderr, "%s: %s (%s)\n", what, error.message, strerror(-result));
        if (error.offset >= 0) {
            fprintf(stderr, "  at byte %" PRId64 "%s%s\n", error.offset, error.field[0] ? ", field " : "", error.field);
        }
        exit(EXIT_FAILURE);
    }
}

/* The recycler's messages. They may come from its own thread. */
static void log_line(void *user, uint32_t level, const char *message)
{
    static const char *const names[] = {"", "error", "warning", "info", "debug"};
    fprintf((FILE *)user, "[%s] %s\n", names[level], message);
}

/* Called between the steps of qcr_compact(); anything but 0 would cancel it. */
static int show_progress(void *user, const struct qcr_progress *progress)
{
    (void)user;
    printf("  %" PRIu64 " of %" PRIu64 " clusters, the file has %" PRIu64 " KiB\n", progress->done, progress->total,
           progress->file_size / 1024);
    return 0;
}

static void print_finding(void *user, const char *text)
{
    (void)user;
    printf("  %s\n", text);
}

int main(int argc, char **argv)
{
    struct qcr_create_options create;
    struct qcr_options options;
    struct qcr_log log;
    struct qcr_compact_report compacted;
    struct qcr_check_report checked;
    struct qcr_stats stats;
    struct qcr_image *image = NULL;
    unsigned char *data;
    unsigned i;

    if (argc != 2) {
        fprintf(stderr, "usage: %s NEW-IMAGE\n", argv[0]);
        return EXIT_FAILURE;
    }

    /* Structs know their size: that lets the library grow and this program stay. */
    QCR_INIT(error);
    QCR_INIT(create);
    QCR_INIT(options);
    QCR_INIT(log);
    QCR_INIT(compacted);
    QCR_INIT(checked);
    QCR_INIT(stats);

    /* A disk of 256 MiB; everything else as QEMU does it by default. An existing file is refused. */
    create.virtual_size = 256 * (uint64_t)MIB;
    must("create", qcr_create_path(argv[1], &create, &error));

    /* The defaults, then what this program wants otherwise. The sizes in the string are sectors of 512 bytes. */
    must("options", qcr_options_init(&options, &error));
    must("options", qcr_options_parse(&options, "id=example;keep_erased=8192", &error));
    log.level = QCR_LOG_INFO;
    log.user = stderr;
    log.log = log_line;

    must("open", qcr_open_path(argv[1], &options, &log, &image, &error));

    /* From here on any number of threads may use the image; the recycler works beside them. */
    must("start", qcr_start(image, &error));

    data = (unsigned char *)malloc(MIB);
    if (data == NULL) {
        perror("malloc");
        return EXIT_FAILURE;
    }
    for (i = 0; i < 32; i++) {
        memset(data, (int)i + 1, MIB);
        must("write", qcr_write(image, data, MIB, (uint64_t)i * MIB, &error));
    }
    /* The guest deletes every file but the last ones: holes at the start of the file, live data at its end. */
    must("discard", qcr_discard(image, 0, 28 * (uint64_t)MIB, &error));
    must("flush", qcr_flush(image, &error));

    /* The recycler would do this by itself in a while; here it is asked to do it now. */
    printf("compacting\n");
    must("compact", qcr_compact(image, show_progress, NULL, &compacted, &error));
    printf("the file had %" PRIu64 " KiB and has %" PRIu64 " KiB; %" PRIu64 " KiB were moved\n",
           compacted.file_size_before / 1024, compacted.file_size_after / 1024, compacted.moved / 1024);

    for (i = 28; i < 32; i++) {
        unsigned n;
        must("read", qcr_read(image, data, MIB, (uint64_t)i * MIB, &error));
        for (n = 0; n < MIB; n++) {
            if (data[n] != i + 1) {
                fprintf(stderr, "byte %u of MiB %u is wrong\n", n, i);
                return EXIT_FAILURE;
            }
        }
    }
    free(data);

    must("stats", qcr_get_stats(image, &stats, &error));
    printf("in use: %" PRIu64 " KiB, device flushes: %" PRIu64 "\n", stats.used / 1024, stats.device_flushes);

    /* Closing makes everything durable and says whether that went well; freeing ends the handle. */
    must("close", qcr_close(image, &error));
    qcr_free(image);

    must("check", qcr_check_path(argv[1], QCR_REPAIR_NONE, print_finding, NULL, &checked, &error));
    printf("corruptions: %" PRIu64 ", leaks: %" PRIu64 "\n", checked.corruptions, checked.leaks);
    return checked.corruptions == 0 && checked.leaks == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
