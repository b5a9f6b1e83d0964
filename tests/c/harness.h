/* What the tests of the C interface share: checks that name their line, and a device in memory that can be told to
 * fail. Everything compiles as C99 and C++17.
 */
#ifndef HARNESS_H
#define HARNESS_H

#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <qcowrecycle.h>

#define KIB UINT64_C(1024)
#define MIB (1024 * KIB)

#define CHECK(condition)                                                       \
    do {                                                                       \
        if (!(condition)) {                                                    \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                           \
        }                                                                      \
    } while (0)

/* The details go to `error`, which every test has; `expected` is 0 or a negative errno. */
#define EXPECT(expected, call)                                                                                   \
    do {                                                                                                         \
        const int expected_ = (expected), result_ = (call);                                                      \
        if (result_ != expected_) {                                                                              \
            fprintf(stderr, "%s:%d: %s gave %d, not %d: %s\n", __FILE__, __LINE__, #call, result_, expected_,    \
                    result_ < 0 ? error.message : "");                                                           \
            exit(1);                                                                                             \
        }                                                                                                        \
        CHECK(result_ == 0 || (error.code == result_ && error.message[0] != 0));                                 \
    } while (0)

struct memory {
    pthread_rwlock_t lock;
    unsigned char *bytes;
    uint64_t length;
    /* How often `destroy` was called. */
    int destroyed;
    /* Calls of the device that still succeed, -1: all; then they fail with `failure`, a callback's result. */
    int left;
    int failure;
    /* Called first in every transfer, if set. */
    void (*hook)(void *user);
    void *hook_user;
};

static inline int memory_enter(struct memory *memory)
{
    CHECK(__sync_fetch_and_add(&memory->destroyed, 0) == 0);
    if (memory->hook != NULL) {
        memory->hook(memory->hook_user);
    }
    if (memory->left < 0) {
        return 0;
    }
    return __sync_sub_and_fetch(&memory->left, 1) < 0 ? (memory->left = 0, memory->failure) : 0;
}

static inline int memory_transfer(struct memory *memory, const struct iovec *iov, int iovcnt, uint64_t offset,
                                  int write)
{
    int result = memory_enter(memory), i;
    CHECK(iovcnt >= 1 && iovcnt <= (int)QCR_IOV_MAX);
    if (result != 0) {
        return result;
    }
    pthread_rwlock_rdlock(&memory->lock);
    for (i = 0; i < iovcnt; i++) {
        /* The library knows the length, so this would be its fault. */
        CHECK(iov[i].iov_len > 0 && offset <= memory->length && iov[i].iov_len <= memory->length - offset);
        if (write) {
            memcpy(memory->bytes + offset, iov[i].iov_base, iov[i].iov_len);
        } else {
            memcpy(iov[i].iov_base, memory->bytes + offset, iov[i].iov_len);
        }
        offset += iov[i].iov_len;
    }
    pthread_rwlock_unlock(&memory->lock);
    return 0;
}

static inline int memory_preadv(void *user, const struct iovec *iov, int iovcnt, uint64_t offset)
{
    return memory_transfer((struct memory *)user, iov, iovcnt, offset, 0);
}

static inline int memory_pwritev(void *user, const struct iovec *iov, int iovcnt, uint64_t offset)
{
    return memory_transfer((struct memory *)user, iov, iovcnt, offset, 1);
}

static inline int memory_flush(void *user)
{
    return memory_enter((struct memory *)user);
}

static inline int memory_length(void *user, uint64_t *length)
{
    struct memory *memory = (struct memory *)user;
    const int result = memory_enter(memory);
    if (result == 0) {
        pthread_rwlock_rdlock(&memory->lock);
        *length = memory->length;
        pthread_rwlock_unlock(&memory->lock);
    }
    return result;
}

static inline int memory_truncate(void *user, uint64_t length)
{
    struct memory *memory = (struct memory *)user;
    const int result = memory_enter(memory);
    if (result != 0) {
        return result;
    }
    pthread_rwlock_wrlock(&memory->lock);
    memory->bytes = (unsigned char *)realloc(memory->bytes, length > 0 ? (size_t)length : 1);
    CHECK(memory->bytes != NULL);
    if (length > memory->length) {
        memset(memory->bytes + memory->length, 0, (size_t)(length - memory->length));
    }
    memory->length = length;
    pthread_rwlock_unlock(&memory->lock);
    return 0;
}

static inline int memory_punch_hole(void *user, uint64_t offset, uint64_t length)
{
    struct memory *memory = (struct memory *)user;
    const int result = memory_enter(memory);
    if (result == 0) {
        pthread_rwlock_rdlock(&memory->lock);
        CHECK(offset <= memory->length && length <= memory->length - offset);
        memset(memory->bytes + offset, 0, (size_t)length);
        pthread_rwlock_unlock(&memory->lock);
    }
    return result;
}

static inline int memory_copy_range(void *user, uint64_t from, uint64_t to, uint64_t length)
{
    struct memory *memory = (struct memory *)user;
    const int result = memory_enter(memory);
    if (result == 0) {
        pthread_rwlock_rdlock(&memory->lock);
        CHECK(from <= memory->length && length <= memory->length - from);
        CHECK(to <= memory->length && length <= memory->length - to);
        memcpy(memory->bytes + to, memory->bytes + from, (size_t)length);
        pthread_rwlock_unlock(&memory->lock);
    }
    return result;
}

static inline void memory_destroyed(void *user)
{
    __sync_fetch_and_add(&((struct memory *)user)->destroyed, 1);
}

static inline void memory_init(struct memory *memory)
{
    memset(memory, 0, sizeof(*memory));
    pthread_rwlock_init(&memory->lock, NULL);
    memory->left = -1;
    memory->failure = -EIO;
}

static inline void memory_free(struct memory *memory)
{
    pthread_rwlock_destroy(&memory->lock);
    free(memory->bytes);
}

static inline struct qcr_block_callbacks memory_callbacks(struct memory *memory)
{
    struct qcr_block_callbacks callbacks;
    QCR_INIT(callbacks);
    callbacks.user = memory;
    callbacks.destroy = memory_destroyed;
    callbacks.preadv = memory_preadv;
    callbacks.pwritev = memory_pwritev;
    callbacks.flush = memory_flush;
    callbacks.length = memory_length;
    callbacks.truncate = memory_truncate;
    callbacks.punch_hole = memory_punch_hole;
    callbacks.copy_range = memory_copy_range;
    return callbacks;
}

/* A new image in memory, whose `destroy` has not been called yet. */
static inline void memory_create(struct memory *memory, uint64_t virtual_size)
{
    struct qcr_create_options create;
    struct qcr_block_callbacks callbacks = memory_callbacks(memory);
    struct qcr_error error;
    QCR_INIT(error);
    QCR_INIT(create);
    create.virtual_size = virtual_size;
    EXPECT(0, qcr_create_callbacks(&callbacks, &create, &error));
    CHECK(memory->destroyed == 1);
    memory->destroyed = 0;
}

static inline struct qcr_image *memory_open(struct memory *memory)
{
    struct qcr_block_callbacks callbacks = memory_callbacks(memory);
    struct qcr_image *image = NULL;
    struct qcr_error error;
    QCR_INIT(error);
    EXPECT(0, qcr_open_callbacks(&callbacks, NULL, NULL, &image, &error));
    CHECK(image != NULL);
    return image;
}

static inline void rest(long milliseconds)
{
    struct timespec time;
    time.tv_sec = milliseconds / 1000;
    time.tv_nsec = milliseconds % 1000 * 1000000;
    nanosleep(&time, NULL);
}

/* The content that belongs at a place of a disk: different at every place and in every round. */
static inline void fill(unsigned char *bytes, size_t length, uint64_t offset, unsigned round)
{
    uint64_t state = (offset + 1) * UINT64_C(0x9e3779b97f4a7c15) + round;
    size_t i;
    for (i = 0; i < length; i++) {
        state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        bytes[i] = (unsigned char)(state >> 56);
    }
}

#endif
