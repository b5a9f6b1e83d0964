/* Many threads on one image, each with its own pieces of the disk, verified; the recycler and compactions beside them;
 * and a close under their feet. A cluster holds pieces of several threads, so they meet in it. The argument is the
 * number of rounds of each thread.
 */
#include "harness.h"

#define THREADS 8
#define PIECE 16384u
/* Of each thread. */
#define PIECES 128u

static struct qcr_image *image;
static unsigned rounds;
/* 1 while a close may come between. */
static int closing;

struct part {
    pthread_t thread;
    unsigned index;
    /* The round that each piece was last written in; 0: it reads as zeroes. */
    unsigned written[PIECES];
    unsigned seed;
};

/* 1 to go on. After the close -EBADF is as good. */
static int went_well(int result, const struct qcr_error *error)
{
    if (result == -EBADF && closing) {
        return 0;
    }
    if (result != 0) {
        fprintf(stderr, "%d: %s\n", result, error->message);
        exit(1);
    }
    return 1;
}

static void *guest(void *argument)
{
    struct part *part = (struct part *)argument;
    unsigned char data[PIECE], back[PIECE];
    struct qcr_error error;
    unsigned round;
    QCR_INIT(error);
    for (round = 1; round <= rounds; round++) {
        const unsigned piece = (part->seed = part->seed * 1103515245u + 12345u) / 65536u % PIECES;
        const unsigned what = (part->seed = part->seed * 1103515245u + 12345u) / 65536u % 16u;
        const uint64_t offset = ((uint64_t)piece * THREADS + part->index) * PIECE;
        if (what < 6) {
            struct iovec iov[3];
            fill(data, PIECE, offset, round);
            iov[0].iov_base = data;
            iov[0].iov_len = 100;
            iov[1].iov_base = data + 100;
            iov[1].iov_len = 0;
            iov[2].iov_base = data + 100;
            iov[2].iov_len = PIECE - 100;
            if (!went_well(qcr_writev(image, iov, 3, offset, &error), &error)) {
                return NULL;
            }
            part->written[piece] = round;
        } else if (what < 8) {
            /* Of a discard of part of a cluster nothing is promised: give it all its zeroes. */
            if (!went_well(qcr_write_zeroes(image, offset, PIECE, QCR_ZERO_MAY_UNMAP, &error), &error)) {
                return NULL;
            }
            part->written[piece] = 0;
        } else if (what == 8) {
            if (!went_well(qcr_flush(image, &error), &error)) {
                return NULL;
            }
        } else {
            if (part->written[piece] != 0) {
                fill(data, PIECE, offset, part->written[piece]);
            } else {
                memset(data, 0, PIECE);
            }
            if (!went_well(qcr_read(image, back, PIECE, offset, &error), &error)) {
                return NULL;
            }
            if (memcmp(data, back, PIECE) != 0) {
                fprintf(stderr, "piece %u at %#" PRIx64 " is not what was written\n", piece, offset);
                exit(1);
            }
        }
    }
    return NULL;
}

static int stop_now;

static void *owner(void *argument)
{
    struct qcr_error error;
    struct qcr_stats stats;
    (void)argument;
    QCR_INIT(error);
    QCR_INIT(stats);
    while (!__sync_fetch_and_add(&stop_now, 0)) {
        int result = qcr_compact(image, NULL, NULL, NULL, &error);
        CHECK(result == 0 || result == -EBUSY || result == -EBADF);
        CHECK(qcr_get_stats(image, &stats, &error) == 0 && stats.background_errors == 0);
        CHECK(qcr_pause(image, NULL) == 0 && qcr_resume(image, NULL) == 0);
        rest(1);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static struct part parts[THREADS];
    struct memory memory;
    struct qcr_block_callbacks callbacks;
    struct qcr_options options;
    struct qcr_check_report report;
    struct qcr_error error;
    pthread_t compactor;
    int i, pass;

    QCR_INIT(error);
    QCR_INIT(report);
    QCR_INIT(options);
    rounds = argc > 1 ? (unsigned)atoi(argv[1]) : 1000;
    EXPECT(0, qcr_options_init(&options, &error));
    EXPECT(0, qcr_options_parse(&options, "keep_erased=512;compact_after_unmaps=256;settle_ms=1;flush_ms=5", &error));
    memory_init(&memory);
    memory_create(&memory, (uint64_t)THREADS * PIECES * PIECE);
    callbacks = memory_callbacks(&memory);

    for (i = 0; i < THREADS; i++) {
        parts[i].index = (unsigned)i;
        parts[i].seed = 4711u + (unsigned)i;
    }
    /* The second time, the image is closed while they work. */
    for (pass = 0; pass < 2; pass++) {
        memory.destroyed = 0;
        EXPECT(0, qcr_open_callbacks(&callbacks, &options, NULL, &image, &error));
        EXPECT(0, qcr_start(image, &error));
        closing = pass;
        stop_now = 0;
        for (i = 0; i < THREADS; i++) {
            CHECK(pthread_create(&parts[i].thread, NULL, guest, &parts[i]) == 0);
        }
        CHECK(pthread_create(&compactor, NULL, owner, NULL) == 0);
        if (pass == 1) {
            rest(20);
            EXPECT(0, qcr_close(image, &error));
        }
        for (i = 0; i < THREADS; i++) {
            pthread_join(parts[i].thread, NULL);
        }
        __sync_fetch_and_add(&stop_now, 1);
        pthread_join(compactor, NULL);
        if (pass == 0) {
            struct qcr_check_report online;
            QCR_INIT(online);
            EXPECT(0, qcr_check(image, NULL, NULL, &online, &error));
            CHECK(online.corruptions == 0);
            EXPECT(0, qcr_close(image, &error));
        }
        qcr_free(image);
        CHECK(memory.destroyed == 1);
        memory.destroyed = 0;
        EXPECT(0, qcr_check_callbacks(&callbacks, QCR_REPAIR_NONE, NULL, NULL, &report, &error));
        CHECK(report.corruptions == 0 && report.leaks == 0);
    }
    memory_free(&memory);
    return 0;
}
