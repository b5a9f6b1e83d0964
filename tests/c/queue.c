/* Asynchronous queues: several on one image, a thread each, verified against what was written, the recycler and
 * compactions beside them; sleeping in poll(2); the kernel's io_uring, and its refusal before or after the queue was
 * made. The arguments: how transfers are to be done (uring, threads, refused, late), the rounds of each thread, and the
 * path of a new image; without a path the image is in memory, and may have asynchronous callbacks beside the others
 * (submit) or alone (submit-only).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "harness.h"

#include "asynchronous.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#define THREADS 3
#define DEPTH 24
#define PIECE 4096u
/* Of each thread; a cluster holds pieces of several. */
#define PIECES 1024u

static struct qcr_image *image;
static unsigned rounds;
static uint32_t queue_flags;
static int refuse_late;

/* From now on this thread, and those it starts, get EPERM for io_uring: as in a container that forbids it. */
static void refuse_io_uring(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (unsigned)offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 425 /* io_uring_setup */, 0, 2),
        BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, 427 /* io_uring_register */, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program;
    program.len = sizeof(code) / sizeof(code[0]);
    program.filter = code;
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
    CHECK(syscall(425, 4, NULL) == -1 && errno == EPERM);
}

struct request {
    unsigned char data[PIECE];
    unsigned piece;
    /* What the piece holds when the request has ended: a round; 0: zeroes. */
    unsigned after;
    int is_read;
    int used;
};

struct part {
    pthread_t thread;
    unsigned index;
    unsigned seed;
    unsigned written[PIECES];
    unsigned char busy[PIECES];
    struct request requests[DEPTH];
    unsigned long uring;
};

static unsigned next(struct part *part)
{
    return (part->seed = part->seed * 1103515245u + 12345u) / 65536u;
}

static void want(unsigned char *bytes, uint64_t offset, unsigned round)
{
    if (round != 0) {
        fill(bytes, PIECE, offset, round);
    } else {
        memset(bytes, 0, PIECE);
    }
}

static uint64_t place(const struct part *part, unsigned piece)
{
    return ((uint64_t)piece * THREADS + part->index) * PIECE;
}

/* Submits something; 0 if the queue is full. */
static int submit(struct part *part, struct qcr_queue *queue, unsigned round)
{
    struct qcr_error error;
    struct request *request = NULL;
    const unsigned piece = next(part) % PIECES, what = next(part) % 16u;
    const uint64_t offset = place(part, piece);
    unsigned i;
    int result;
    QCR_INIT(error);
    for (i = 0; i < DEPTH && request == NULL; i++) {
        request = part->requests[i].used ? NULL : &part->requests[i];
    }
    if (request == NULL) {
        CHECK(qcr_queue_flush(queue, 0, &error) == -EBUSY && error.code == -EBUSY);
        return 0;
    }
    if (part->busy[piece]) {
        return 1;
    }
    request->piece = piece;
    request->is_read = 0;
    request->after = part->written[piece];
    if (what < 6) {
        struct iovec iov[3];
        request->after = round;
        fill(request->data, PIECE, offset, round);
        iov[0].iov_base = request->data;
        iov[0].iov_len = 512;
        iov[1].iov_base = NULL;
        iov[1].iov_len = 0;
        iov[2].iov_base = request->data + 512;
        iov[2].iov_len = PIECE - 512;
        result = what < 3 ? qcr_queue_write(queue, request->data, PIECE, offset, (uint64_t)(uintptr_t)request, &error)
                          : qcr_queue_writev(queue, iov, 3, offset, (uint64_t)(uintptr_t)request, &error);
    } else if (what < 8) {
        request->after = 0;
        result = qcr_queue_write_zeroes(queue, offset, PIECE, QCR_ZERO_MAY_UNMAP, (uint64_t)(uintptr_t)request, &error);
    } else if (what == 8) {
        result = qcr_queue_flush(queue, (uint64_t)(uintptr_t)request, &error);
    } else {
        request->is_read = 1;
        result = qcr_queue_read(queue, request->data, PIECE, offset, (uint64_t)(uintptr_t)request, &error);
    }
    if (result != 0) {
        fprintf(stderr, "%d: %s\n", result, error.message);
        exit(1);
    }
    request->used = 1;
    part->busy[piece] = 1;
    return 1;
}

static void ended(struct part *part, const struct qcr_completion *completion)
{
    struct request *request = (struct request *)(uintptr_t)completion->user_data;
    CHECK(request >= part->requests && request < part->requests + DEPTH && request->used);
    if (completion->result != 0) {
        fprintf(stderr, "a request ended with %d\n", completion->result);
        exit(1);
    }
    if (request->is_read) {
        unsigned char expected[PIECE];
        want(expected, place(part, request->piece), part->written[request->piece]);
        if (memcmp(expected, request->data, PIECE) != 0) {
            fprintf(stderr, "piece %u is not what was written\n", request->piece);
            exit(1);
        }
    }
    part->written[request->piece] = request->after;
    part->busy[request->piece] = 0;
    request->used = 0;
}

/* Sleeps as an event loop does. */
static void sleep_in_poll(struct qcr_queue *queue, int fd)
{
    struct pollfd poll_fd;
    struct qcr_error error;
    size_t ready = 0;
    QCR_INIT(error);
    EXPECT(0, qcr_queue_arm(queue, &ready, &error));
    poll_fd.fd = fd;
    poll_fd.events = POLLIN;
    while (ready == 0 && poll(&poll_fd, 1, 60000) != 1) {
        CHECK(errno == EINTR);
    }
}

static void *guest(void *argument)
{
    struct part *part = (struct part *)argument;
    struct qcr_queue *queue = NULL;
    struct qcr_queue_options options;
    struct qcr_queue_info info;
    struct qcr_completion completions[8];
    struct qcr_error error;
    size_t count, i;
    unsigned round = 0;
    int fd = -1;
    QCR_INIT(error);
    QCR_INIT(info);
    QCR_INIT(options);
    options.depth = DEPTH;
    options.flags = queue_flags;
    options.threads = 1 + part->index * 4;
    EXPECT(0, qcr_queue_create(image, &options, &queue, &error));
    EXPECT(0, qcr_queue_eventfd(queue, &fd, &error));
    EXPECT(0, qcr_queue_get_info(queue, &info, &error));
    part->uring += (info.flags & QCR_QUEUE_IO_URING) != 0;
    for (;;) {
        unsigned batch = next(part) % DEPTH;
        if (refuse_late && round == rounds / 2) {
            EXPECT(0, qcr_queue_kick(queue, &error));
            refuse_io_uring();
            round++;
        }
        while (round < rounds && batch-- > 0 && submit(part, queue, round + 1)) {
            round++;
        }
        EXPECT(0, qcr_queue_get_info(queue, &info, &error));
        if (round == rounds && info.pending == 0) {
            break;
        }
        if (info.pending > 0 && next(part) % 4u == 0) {
            /* It may have been woken for nothing, but is never left asleep. */
            sleep_in_poll(queue, fd);
            EXPECT(0, qcr_queue_reap(queue, completions, 8, 0, 0, &count, &error));
        } else {
            EXPECT(0, qcr_queue_reap(queue, completions, 8, next(part) % 6u, -1, &count, &error));
        }
        for (i = 0; i < count; i++) {
            ended(part, &completions[i]);
        }
    }
    EXPECT(0, qcr_queue_failure(queue, &error));
    qcr_queue_free(queue);
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
        EXPECT(0, qcr_compact(image, NULL, NULL, NULL, &error));
        CHECK(qcr_get_stats(image, &stats, &error) == 0 && stats.background_errors == 0);
        rest(2);
    }
    return NULL;
}

/* What fails, and how it is told. */
static void failures(void)
{
    struct qcr_queue *queue = NULL;
    struct qcr_queue_options options;
    struct qcr_completion completion;
    struct qcr_error error;
    unsigned char data[1024];
    size_t count = 77;
    QCR_INIT(error);
    QCR_INIT(options);
    fill(data, sizeof(data), 0, 1);
    options.flags = 8;
    EXPECT(-EINVAL, qcr_queue_create(image, &options, &queue, &error));
    options.flags = queue_flags;
    options.depth = 1 << 30;
    EXPECT(-EINVAL, qcr_queue_create(image, &options, &queue, &error));
    CHECK(strcmp(error.field, "depth") == 0 && queue == NULL);
    options.depth = 0;
    EXPECT(0, qcr_queue_create(image, queue_flags == 0 ? NULL : &options, &queue, &error));
    EXPECT(-EINVAL, qcr_queue_read(queue, NULL, 512, 0, 1, &error));
    EXPECT(-EINVAL, qcr_queue_write_zeroes(queue, 0, 512, 4, 1, &error));
    EXPECT(-EINVAL, qcr_queue_eventfd(queue, NULL, &error));
    EXPECT(-EINVAL, qcr_queue_reap(queue, NULL, 1, 0, 0, &count, &error));
    EXPECT(-EINVAL, qcr_queue_reap(queue, &completion, 1, 0, 0, NULL, &error));
    CHECK(count == 77);
    EXPECT(0, qcr_queue_reap(queue, &completion, 1, 1, -1, &count, &error));
    CHECK(count == 0);
    EXPECT(0, qcr_queue_failure(queue, &error));
    EXPECT(0, qcr_queue_read(queue, data, sizeof(data), UINT64_C(1) << 50, UINT64_C(0xfedcba9876543210), &error));
    EXPECT(0, qcr_queue_reap(queue, &completion, 1, 1, -1, &count, &error));
    CHECK(count == 1 && completion.user_data == UINT64_C(0xfedcba9876543210) && completion.result == -EINVAL);
    EXPECT(-EINVAL, qcr_queue_failure(queue, &error));
    CHECK(error.offset == (int64_t)1 << 50);
    /* The image may be closed before; what is submitted then fails. */
    EXPECT(0, qcr_queue_write(queue, data, sizeof(data), 0, 5, &error));
    EXPECT(0, qcr_close(image, &error));
    EXPECT(0, qcr_queue_flush(queue, 6, &error));
    EXPECT(0, qcr_queue_reap(queue, &completion, 1, 1, 60000000, &count, &error));
    CHECK(count == 1);
    EXPECT(0, qcr_queue_reap(queue, &completion, 1, 1, 60000000, &count, &error));
    CHECK(count == 1);
    EXPECT(-EBADF, qcr_queue_failure(queue, &error));
    qcr_queue_free(queue);
}

int main(int argc, char **argv)
{
    static struct part parts[THREADS];
    static struct slow slow;
    struct memory *memory = &slow.memory;
    struct qcr_block_callbacks callbacks;
    struct qcr_create_options create;
    struct qcr_options options;
    struct qcr_check_report report;
    struct qcr_error error;
    pthread_t compactor;
    unsigned i;
    unsigned long uring = 0;
    const char *how = argc > 1 ? argv[1] : "uring", *path = argc > 3 ? argv[3] : NULL;

    alarm(280);
    QCR_INIT(error);
    QCR_INIT(create);
    QCR_INIT(report);
    QCR_INIT(options);
    rounds = argc > 2 ? (unsigned)atoi(argv[2]) : 1000;
    queue_flags = strcmp(how, "threads") == 0 ? QCR_QUEUE_THREADS : 0;
    refuse_late = strcmp(how, "late") == 0;
    if (strcmp(how, "refused") == 0) {
        refuse_io_uring();
    }
    EXPECT(0, qcr_options_init(&options, &error));
    EXPECT(0, qcr_options_parse(&options, "keep_erased=512;compact_after_unmaps=256;settle_ms=1;flush_ms=5", &error));
    create.virtual_size = (uint64_t)THREADS * PIECES * PIECE;
    create.cluster_size = 16384;
    slow_init(&slow, 2);
    callbacks = memory_callbacks(memory);
    if (strncmp(how, "submit", 6) == 0) {
        callbacks = slow_callbacks(&slow, how[6] == 0);
    }
    if (path != NULL) {
        EXPECT(0, qcr_create_path(path, &create, &error));
        EXPECT(0, qcr_open_path(path, &options, NULL, &image, &error));
    } else {
        memory_create(memory, create.virtual_size);
        EXPECT(0, qcr_open_callbacks(&callbacks, &options, NULL, &image, &error));
    }
    EXPECT(0, qcr_start(image, &error));
    for (i = 0; i < THREADS; i++) {
        parts[i].index = i;
        parts[i].seed = 815u + i;
        CHECK(pthread_create(&parts[i].thread, NULL, guest, &parts[i]) == 0);
    }
    CHECK(pthread_create(&compactor, NULL, owner, NULL) == 0);
    for (i = 0; i < THREADS; i++) {
        pthread_join(parts[i].thread, NULL);
        uring += parts[i].uring;
    }
    __sync_fetch_and_add(&stop_now, 1);
    pthread_join(compactor, NULL);
    failures();
    qcr_free(image);
    if (path != NULL) {
        EXPECT(0, qcr_check_path(path, QCR_REPAIR_NONE, NULL, NULL, &report, &error));
    } else {
        memory->destroyed = 0;
        EXPECT(0, qcr_check_callbacks(&callbacks, QCR_REPAIR_NONE, NULL, NULL, &report, &error));
    }
    CHECK(report.corruptions == 0 && report.leaks == 0);
    slow_free(&slow);
    printf("queues on io_uring: %lu\n", uring);
    return 0;
}
