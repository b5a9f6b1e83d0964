/* What the benchmark calls seldom, put in terms that need no struct of the header in Rust; and a check that what it
 * calls often is declared in src/library.rs as it is in the header.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include "qcowrecycle.h"

#define SAME(function, type) _Static_assert(_Generic(&(function), type: 1, default: 0), #function " has changed")

SAME(qcr_read, int (*)(struct qcr_image *, void *, size_t, uint64_t, struct qcr_error *));
SAME(qcr_write, int (*)(struct qcr_image *, const void *, size_t, uint64_t, struct qcr_error *));
SAME(qcr_flush, int (*)(struct qcr_image *, struct qcr_error *));
SAME(qcr_discard, int (*)(struct qcr_image *, uint64_t, uint64_t, struct qcr_error *));
SAME(qcr_start, int (*)(struct qcr_image *, struct qcr_error *));
SAME(qcr_pause, int (*)(struct qcr_image *, struct qcr_error *));
SAME(qcr_resume, int (*)(struct qcr_image *, struct qcr_error *));
SAME(qcr_stop, int (*)(struct qcr_image *, struct qcr_error *));
SAME(qcr_close, int (*)(struct qcr_image *, struct qcr_error *));
SAME(qcr_free, void (*)(struct qcr_image *));

/* The message of a failed open goes to standard error. */
int bench_open(const char *path, const char *config, struct qcr_image **image)
{
    struct qcr_options options;
    struct qcr_error error;
    int result;

    QCR_INIT(options);
    QCR_INIT(error);
    result = qcr_options_init(&options, &error);
    if (!result)
        result = qcr_options_parse(&options, config, &error);
    if (!result)
        result = qcr_open_path(path, &options, NULL, image, &error);
    if (result)
        fprintf(stderr, "%s: %s\n", path, error.message);
    return result;
}

/* before, after, moved, cancelled */
int bench_compact(struct qcr_image *image, uint64_t report[4])
{
    struct qcr_compact_report full;
    struct qcr_error error;
    int result;

    QCR_INIT(full);
    QCR_INIT(error);
    result = qcr_compact(image, NULL, NULL, &full, &error);
    if (result) {
        fprintf(stderr, "%s\n", error.message);
        return result;
    }
    report[0] = full.file_size_before;
    report[1] = full.file_size_after;
    report[2] = full.moved;
    report[3] = full.cancelled;
    return 0;
}

/* The statistics in the order of the names in src/library.rs. */
int bench_stats(struct qcr_image *image, uint64_t values[9])
{
    struct qcr_stats stats;
    int result;

    QCR_INIT(stats);
    result = qcr_get_stats(image, &stats, NULL);
    if (result)
        return result;
    values[0] = stats.file_size;
    values[1] = stats.junk;
    values[2] = stats.available;
    values[3] = stats.device_flushes;
    values[4] = stats.metadata_read_bytes;
    values[5] = stats.metadata_write_bytes;
    values[6] = stats.moved_bytes;
    values[7] = stats.background_errors;
    values[8] = stats.moves_copying + stats.moves_copied + stats.moves_flushed + stats.moves_referenced;
    return 0;
}

#ifdef QCR_QUEUE_THREADS

int bench_queue_open(struct qcr_image *image, uint32_t depth, struct qcr_queue **queue)
{
    struct qcr_queue_options options;

    QCR_INIT(options);
    options.depth = depth;
    return qcr_queue_create(image, &options, queue, NULL);
}

/* Goes through the offsets with `depth` requests under way, each with a buffer of its own. Nothing is under way when it
 * returns 0.
 */
int bench_queue_run(struct qcr_queue *queue, int write, void *const *buffers, size_t depth, size_t size,
                    const uint64_t *offsets, size_t count)
{
    struct qcr_completion done[64];
    size_t next = 0, missing = 0, reaped, i;
    int result = 0, failed = 0;

    if (depth > sizeof(done) / sizeof(done[0]))
        return -EINVAL;
    for (i = 0; i < depth; i++)
        done[i].user_data = i;
    reaped = depth;
    for (;;) {
        for (i = 0; i < reaped && next < count && !failed; i++, next++, missing++) {
            uint64_t slot = done[i].user_data;

            failed = write ? qcr_queue_write(queue, buffers[slot], size, offsets[next], slot, NULL)
                           : qcr_queue_read(queue, buffers[slot], size, offsets[next], slot, NULL);
            if (failed)
                missing--;
        }
        if (!missing)
            return failed;
        result = qcr_queue_reap(queue, done, depth, 1, -1, &reaped, NULL);
        if (result)
            abort(); /* the kernel may still use the buffers */
        missing -= reaped;
        for (i = 0; i < reaped; i++)
            if (done[i].result)
                failed = done[i].result;
    }
}

void bench_queue_close(struct qcr_queue *queue)
{
    qcr_queue_free(queue);
}

#else /* a library without queues */

struct qcr_queue;

int bench_queue_open(struct qcr_image *image, uint32_t depth, struct qcr_queue **queue)
{
    (void)image, (void)depth, (void)queue;
    return -ENOSYS;
}

int bench_queue_run(struct qcr_queue *queue, int write, void *const *buffers, size_t depth, size_t size,
                    const uint64_t *offsets, size_t count)
{
    (void)queue, (void)write, (void)buffers, (void)depth, (void)size, (void)offsets, (void)count;
    return -ENOSYS;
}

void bench_queue_close(struct qcr_queue *queue)
{
    (void)queue;
}

#endif
