/* A device in memory whose transfers and flushes end later, in any order, on threads of its own, or at once within the
 * call that submits them.
 */
#ifndef ASYNCHRONOUS_H
#define ASYNCHRONOUS_H

#include "harness.h"

#define SLOW_MOST 512
#define SLOW_THREADS 4

struct submitted {
    struct qcr_io *io;
    const struct iovec *iov;
    int iovcnt;
    uint64_t offset;
    /* 0: a read; 1: a write; 2: a flush. */
    int what;
};

struct slow {
    /* The first member: what is called at once takes it for its user's data. */
    struct memory memory;
    pthread_mutex_t lock;
    pthread_cond_t news;
    struct submitted waiting[SLOW_MOST];
    int count;
    /* Nothing ends until this is cleared, and nothing at once. */
    int held;
    int flush_fails;
    int stopping;
    unsigned seed;
    unsigned long at_once, later, out_of_order;
    pthread_t threads[SLOW_THREADS];
    int started;
};

/* Carries something out and tells of its end. */
static inline void slow_end(struct slow *slow, const struct submitted *what)
{
    int result;
    if (what->what == 2) {
        result = slow->flush_fails ? -EIO : memory_enter(&slow->memory);
    } else {
        result = memory_transfer(&slow->memory, what->iov, what->iovcnt, what->offset, what->what);
    }
    qcr_io_complete(what->io, result);
}

/* Takes out what waits at `index`; the lock is held. */
static inline struct submitted slow_take(struct slow *slow, int index)
{
    const struct submitted one = slow->waiting[index];
    slow->out_of_order += index > 0;
    slow->count--;
    memmove(&slow->waiting[index], &slow->waiting[index + 1], (size_t)(slow->count - index) * sizeof(one));
    return one;
}

static inline unsigned slow_next(struct slow *slow)
{
    return (slow->seed = slow->seed * 1103515245u + 12345u) / 65536u;
}

static inline void *slow_work(void *argument)
{
    struct slow *slow = (struct slow *)argument;
    pthread_mutex_lock(&slow->lock);
    for (;;) {
        struct submitted one;
        while (!slow->stopping && (slow->count == 0 || slow->held)) {
            pthread_cond_wait(&slow->news, &slow->lock);
        }
        if (slow->stopping) {
            break;
        }
        one = slow_take(slow, (int)(slow_next(slow) % (unsigned)slow->count));
        slow->later++;
        pthread_mutex_unlock(&slow->lock);
        slow_end(slow, &one);
        pthread_mutex_lock(&slow->lock);
    }
    pthread_mutex_unlock(&slow->lock);
    return NULL;
}

static inline void slow_submit(struct slow *slow, int what, const struct iovec *iov, int iovcnt, uint64_t offset,
                               struct qcr_io *io)
{
    struct submitted one;
    int at_once;
    one.io = io;
    one.iov = iov;
    one.iovcnt = iovcnt;
    one.offset = offset;
    one.what = what;
    pthread_mutex_lock(&slow->lock);
    at_once = !slow->held && slow_next(slow) % 4u == 0;
    if (at_once) {
        slow->at_once++;
    } else {
        CHECK(slow->count < SLOW_MOST);
        slow->waiting[slow->count++] = one;
        pthread_cond_signal(&slow->news);
    }
    pthread_mutex_unlock(&slow->lock);
    if (at_once) {
        slow_end(slow, &one);
    }
}

static inline void slow_preadv(void *user, const struct iovec *iov, int iovcnt, uint64_t offset, struct qcr_io *io)
{
    slow_submit((struct slow *)user, 0, iov, iovcnt, offset, io);
}

static inline void slow_pwritev(void *user, const struct iovec *iov, int iovcnt, uint64_t offset, struct qcr_io *io)
{
    slow_submit((struct slow *)user, 1, iov, iovcnt, offset, io);
}

static inline void slow_flush(void *user, struct qcr_io *io)
{
    slow_submit((struct slow *)user, 2, NULL, 0, 0, io);
}

static inline void slow_hold(struct slow *slow, int held)
{
    pthread_mutex_lock(&slow->lock);
    slow->held = held;
    pthread_cond_broadcast(&slow->news);
    pthread_mutex_unlock(&slow->lock);
}

static inline int slow_waiting(struct slow *slow)
{
    int count;
    pthread_mutex_lock(&slow->lock);
    count = slow->count;
    pthread_mutex_unlock(&slow->lock);
    return count;
}

/* Does nothing by itself without threads. */
static inline void slow_init(struct slow *slow, int threads)
{
    memset(slow, 0, sizeof(*slow));
    memory_init(&slow->memory);
    pthread_mutex_init(&slow->lock, NULL);
    pthread_cond_init(&slow->news, NULL);
    slow->seed = 4711;
    for (slow->started = 0; slow->started < threads; slow->started++) {
        CHECK(pthread_create(&slow->threads[slow->started], NULL, slow_work, slow) == 0);
    }
}

static inline void slow_free(struct slow *slow)
{
    int i;
    CHECK(slow->count == 0);
    pthread_mutex_lock(&slow->lock);
    slow->stopping = 1;
    pthread_cond_broadcast(&slow->news);
    pthread_mutex_unlock(&slow->lock);
    for (i = 0; i < slow->started; i++) {
        pthread_join(slow->threads[i], NULL);
    }
    pthread_cond_destroy(&slow->news);
    pthread_mutex_destroy(&slow->lock);
    memory_free(&slow->memory);
}

/* Asynchronous callbacks, with or without the others beside them. */
static inline struct qcr_block_callbacks slow_callbacks(struct slow *slow, int both)
{
    struct qcr_block_callbacks callbacks = memory_callbacks(&slow->memory);
    callbacks.user = slow;
    callbacks.submit_preadv = slow_preadv;
    callbacks.submit_pwritev = slow_pwritev;
    callbacks.submit_flush = slow_flush;
    if (!both) {
        callbacks.preadv = NULL;
        callbacks.pwritev = NULL;
        callbacks.flush = NULL;
    }
    return callbacks;
}

#endif
