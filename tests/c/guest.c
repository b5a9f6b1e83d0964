/* A guest that works on an image for ever, from several threads, and tells on standard output what it does:
 *
 *     guest IMAGE SEED FIRST_VERSION THREADS CONFIG [DEPTH]
 *
 * The lines are those of crash_child.py, each told by one write. Every thread has a part of the disk to itself, so that
 * what it tells before it acts is in the order in which it happens. With a depth, each thread works through a queue, and
 * as many guests of its own share it: each has a number and a part of the disk as a thread has, and one request under way.
 * Ends with status 3 when the image fails it.
 */
#include "harness.h"

#include <fcntl.h>

#define SECTOR UINT64_C(512)
#define LONGEST (256 * KIB)

static struct qcr_image *image;
static struct qcr_info info;
static uint64_t seed;
static uint64_t version;

struct guest {
    uint64_t number;
    /* NULL: it waits for each of its requests. */
    struct qcr_queue *queue;
    int is_flushing;
    uint64_t state;
    /* Its part of the disk, in clusters. */
    uint64_t first, clusters;
    unsigned char *data;
};

static uint64_t below(struct guest *guest, uint64_t limit)
{
    guest->state += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t z = guest->state;
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (z ^ (z >> 31)) % limit;
}

static void tell(const char *format, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
    char line[120];
    const int length = snprintf(line, sizeof(line), format, a, b, c, d);
    CHECK(length > 0 && (size_t)length < sizeof(line));
    CHECK(write(1, line, (size_t)length) == length);
}

static void must(int result, const char *what, const struct qcr_error *error)
{
    if (result != 0) {
        fprintf(stderr, "%s: %s\n", what, error->message);
        _exit(3);
    }
}

/* Every sector knows where on the disk it belongs and which write it came from. */
static void stamp(unsigned char *data, uint64_t offset, uint64_t length, uint64_t write)
{
    uint64_t at;
    size_t i;
    for (at = 0; at < length; at += SECTOR) {
        for (i = 0; i < SECTOR; i += 16) {
            const uint64_t place = offset + at;
            memcpy(data + at + i, &place, 8);
            memcpy(data + at + i + 8, &write, 8);
        }
    }
}

static void store(struct guest *guest, uint64_t offset, uint64_t length)
{
    struct qcr_error error;
    const uint64_t write = __sync_add_and_fetch(&version, 1);
    struct iovec iov[2];
    const uint64_t cut = below(guest, length / SECTOR + 1) * SECTOR;
    QCR_INIT(error);
    stamp(guest->data, offset, length, write);
    tell("w %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", offset, length, write, guest->number);
    iov[0].iov_base = guest->data;
    iov[0].iov_len = (size_t)cut;
    iov[1].iov_base = guest->data + cut;
    iov[1].iov_len = (size_t)(length - cut);
    if (guest->queue != NULL) {
        must(qcr_queue_writev(guest->queue, iov, 2, offset, (uint64_t)(uintptr_t)guest, &error), "write", &error);
    } else {
        must(qcr_writev(image, iov, 2, offset, &error), "write", &error);
    }
}

static void clear(struct guest *guest, uint64_t offset, uint64_t length)
{
    struct qcr_error error;
    QCR_INIT(error);
    tell("z %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", offset, length, guest->number, 0);
    if (below(guest, 5) > 0) {
        must(guest->queue != NULL ? qcr_queue_discard(guest->queue, offset, length, (uint64_t)(uintptr_t)guest, &error)
                                  : qcr_discard(image, offset, length, &error),
             "discard", &error);
    } else {
        const uint32_t flags = below(guest, 2) > 0 ? QCR_ZERO_MAY_UNMAP : 0;
        must(guest->queue != NULL
                 ? qcr_queue_write_zeroes(guest->queue, offset, length, flags, (uint64_t)(uintptr_t)guest, &error)
                 : qcr_write_zeroes(image, offset, length, flags, &error),
             "write_zeroes", &error);
    }
}

static void compact(void)
{
    struct qcr_error error;
    int result;
    QCR_INIT(error);
    result = qcr_compact(image, NULL, NULL, NULL, &error);
    if (result != -EBUSY) {
        must(result, "compact", &error);
    }
}

static void flush(struct guest *guest)
{
    struct qcr_error error;
    QCR_INIT(error);
    tell("f %" PRIu64 "\n", guest->number, 0, 0, 0);
    if (guest->queue != NULL) {
        guest->is_flushing = 1;
        must(qcr_queue_flush(guest->queue, (uint64_t)(uintptr_t)guest, &error), "flush", &error);
        return;
    }
    must(qcr_flush(image, &error), "flush", &error);
    tell("F %" PRIu64 "\n", guest->number, 0, 0, 0);
}

/* One request. */
static void act(struct guest *guest)
{
    const uint64_t start = guest->first * info.cluster_size, size = guest->clusters * info.cluster_size;
    uint64_t choice;
    while ((choice = below(guest, 37)) == 36) {
        compact();
    }
    if (choice < 12) {
        const uint64_t length = (1 + below(guest, 16)) * SECTOR;
        store(guest, start + below(guest, (size - length) / SECTOR + 1) * SECTOR, length);
    } else if (choice < 32) {
        const uint64_t first = below(guest, guest->clusters);
        const uint64_t most = guest->clusters - first, wanted = 1 + below(guest, 1 + guest->clusters / 4);
        const uint64_t length = (wanted < most ? wanted : most) * info.cluster_size;
        const uint64_t offset = start + first * info.cluster_size;
        if (choice < 20) {
            store(guest, offset, length < LONGEST ? length : LONGEST);
        } else {
            clear(guest, offset, length);
        }
    } else {
        flush(guest);
    }
}

static void *work(void *argument)
{
    for (;;) {
        act((struct guest *)argument);
    }
    return NULL;
}

/* The guests of one queue. */
struct table {
    struct guest **guests;
    uint32_t depth;
};

static void *work_through_queue(void *argument)
{
    const struct table *table = (const struct table *)argument;
    struct qcr_completion done[8];
    struct qcr_queue_options options;
    struct qcr_queue *queue = NULL;
    struct qcr_error error;
    size_t count, i;
    QCR_INIT(error);
    QCR_INIT(options);
    options.depth = table->depth;
    must(qcr_queue_create(image, &options, &queue, &error), "queue", &error);
    for (i = 0; i < table->depth; i++) {
        table->guests[i]->queue = queue;
        act(table->guests[i]);
    }
    for (;;) {
        must(qcr_queue_reap(queue, done, 8, 1, -1, &count, &error), "reap", &error);
        for (i = 0; i < count; i++) {
            struct guest *guest = (struct guest *)(uintptr_t)done[i].user_data;
            must(done[i].result == 0 ? 0 : qcr_queue_failure(queue, &error), "request", &error);
            if (guest->is_flushing) {
                guest->is_flushing = 0;
                tell("F %" PRIu64 "\n", guest->number, 0, 0, 0);
            }
            act(guest);
        }
    }
    return NULL;
}

static struct guest *new_guest(uint64_t number, uint64_t guests)
{
    struct guest *guest = (struct guest *)calloc(1, sizeof(*guest));
    CHECK(guest != NULL);
    guest->number = number;
    guest->state = seed * 1000 + number;
    guest->clusters = info.virtual_size / info.cluster_size / guests;
    guest->first = number * guest->clusters;
    guest->data = (unsigned char *)malloc(LONGEST);
    CHECK(guest->data != NULL && guest->clusters * info.cluster_size >= 16 * SECTOR);
    return guest;
}

int main(int argc, char **argv)
{
    struct qcr_options options;
    struct qcr_error error;
    pthread_t thread;
    uint64_t i, k, threads, depth;
    CHECK(argc == 6 || argc == 7);
    seed = strtoull(argv[2], NULL, 10);
    version = strtoull(argv[3], NULL, 10);
    threads = strtoull(argv[4], NULL, 10);
    depth = argc == 7 ? strtoull(argv[6], NULL, 10) : 0;
    QCR_INIT(options);
    QCR_INIT(error);
    QCR_INIT(info);
    must(qcr_options_init(&options, &error), "options", &error);
    must(qcr_options_parse(&options, argv[5], &error), "options", &error);
    must(qcr_open_path(argv[1], &options, NULL, &image, &error), "open", &error);
    must(qcr_get_info(image, &info, &error), "info", &error);
    must(qcr_start(image, &error), "start", &error);
    tell("open\n", 0, 0, 0, 0);
    for (i = 0; i < threads; i++) {
        struct table *table;
        if (depth == 0) {
            CHECK(pthread_create(&thread, NULL, work, new_guest(i, threads)) == 0);
            continue;
        }
        table = (struct table *)calloc(1, sizeof(*table));
        CHECK(table != NULL);
        table->depth = (uint32_t)depth;
        table->guests = (struct guest **)calloc((size_t)depth, sizeof(*table->guests));
        CHECK(table->guests != NULL);
        for (k = 0; k < depth; k++) {
            table->guests[k] = new_guest(i * depth + k, threads * depth);
        }
        CHECK(pthread_create(&thread, NULL, work_through_queue, table) == 0);
    }
    pause();
    return 0;
}
