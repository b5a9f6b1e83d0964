/* A qcow2 image whose bytes are in memory, reached through block callbacks: the shape of a driver for a volume manager
 * or a network store.
 *
 *     cc -pthread memory_disk.c $(pkg-config --cflags --libs qcowrecycle) -o memory_disk
 *     ./memory_disk
 *
 * SPDX-License-Identifier: Apache-2.0 OR MIT
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <qcowrecycle.h>

#define MIB (1024u * 1024u)

/* The device. Callbacks come from several threads at once, so the ones that change where the bytes are exclude the
 * others; reads and writes need not exclude one another.
 */
struct memory {
    pthread_rwlock_t lock;
    unsigned char *bytes;
    uint64_t length;
};

/* A transfer is whole or fails: this never moves less than it was asked for. */
static int memory_preadv(void *user, const struct iovec *iov, int iovcnt, uint64_t offset)
{
    struct memory *memory = (struct memory *)user;
    int result = 0, i;
    pthread_rwlock_rdlock(&memory->lock);
    for (i = 0; i < iovcnt && result == 0; i++) {
        if (offset > memory->length || iov[i].iov_len > memory->length - offset) {
            result = -EIO;
        } else {
            memcpy(iov[i].iov_base, memory->bytes + offset, iov[i].iov_len);
            offset += iov[i].iov_len;
        }
    }
    pthread_rwlock_unlock(&memory->lock);
    return result;
}

static int memory_pwritev(void *user, const struct iovec *iov, int iovcnt, uint64_t offset)
{
    struct memory *memory = (struct memory *)user;
    int result = 0, i;
    pthread_rwlock_rdlock(&memory->lock);
    for (i = 0; i < iovcnt && result == 0; i++) {
        if (offset > memory->length || iov[i].iov_len > memory->length - offset) {
            result = -EIO;
        } else {
            memcpy(memory->bytes + offset, iov[i].iov_base, iov[i].iov_len);
            offset += iov[i].iov_len;
        }
    }
    pthread_rwlock_unlock(&memory->lock);
    return result;
}

/* Memory has nothing to make durable. A real device must not return before everything is. */
static int memory_flush(void *user)
{
    (void)user;
    return 0;
}

static int memory_length(void *user, uint64_t *length)
{
    struct memory *memory = (struct memory *)user;
    pthread_rwlock_rdlock(&memory->lock);
    *length = memory->length;
    pthread_rwlock_unlock(&memory->lock);
    return 0;
}

/* New bytes are zero, even where the device once had others. */
static int memory_truncate(void *user, uint64_t length)
{
    struct memory *memory = (struct memory *)user;
    unsigned char *bytes;
    int result = 0;
    pthread_rwlock_wrlock(&memory->lock);
    bytes = (unsigned char *)realloc(memory->bytes, length > 0 ? (size_t)length : 1);
    if (bytes == NULL) {
        result = -ENOSPC;
    } else {
        if (length > memory->length) {
            memset(bytes + memory->length, 0, (size_t)(length - memory->length));
        }
        memory->bytes = bytes;
        memory->length = length;
    }
    pthread_rwlock_unlock(&memory->lock);
    return result;
}

/* The library does not need the device any more. This comes exactly once, also when opening fails. */
static void memory_destroy(void *user)
{
    struct memory *memory = (struct memory *)user;
    printf("the device is not needed any more\n");
    pthread_rwlock_destroy(&memory->lock);
    free(memory->bytes);
    free(memory);
}

static struct qcr_error error;

static void must(const char *what, int result)
{
    if (result < 0) {
        fprintf(stderr, "%s: %s (%s)\n", what, error.message, strerror(-result));
        exit(EXIT_FAILURE);
    }
}

/* One guest thread: its own part of the disk, written, read back and discarded. */
struct guest {
    pthread_t thread;
    struct qcr_image *image;
    uint64_t start;
    int result;
};

static void *run_guest(void *argument)
{
    struct guest *guest = (struct guest *)argument;
    unsigned char pattern[16384], back[sizeof(pattern)];
    unsigned i;
    for (i = 0; i < 64; i++) {
        const uint64_t offset = guest->start + (uint64_t)i * sizeof(pattern);
        /* Two areas of memory, as a guest's scattered pages would be. */
        struct iovec areas[2];
        memset(pattern, (int)(offset >> 14) | 1, sizeof(pattern));
        areas[0].iov_base = pattern;
        areas[0].iov_len = 4096;
        areas[1].iov_base = pattern + 4096;
        areas[1].iov_len = sizeof(pattern) - 4096;
        /* NULL: this thread does not want the details of an error. */
        guest->result = qcr_writev(guest->image, areas, 2, offset, NULL);
        if (guest->result == 0) {
            guest->result = qcr_read(guest->image, back, sizeof(back), offset, NULL);
        }
        if (guest->result == 0 && memcmp(pattern, back, sizeof(back)) != 0) {
            guest->result = -EILSEQ;
        }
        if (guest->result < 0) {
            return NULL;
        }
    }
    guest->result = qcr_discard(guest->image, guest->start, 512 * 1024, NULL);
    return NULL;
}

int main(void)
{
    struct qcr_block_callbacks callbacks;
    struct qcr_create_options create;
    struct qcr_image *image = NULL;
    struct qcr_stats stats;
    struct guest guests[4];
    struct memory *memory;
    char *text;
    size_t needed;
    unsigned i;

    QCR_INIT(error);
    QCR_INIT(create);
    QCR_INIT(stats);
    QCR_INIT(callbacks);

    memory = (struct memory *)calloc(1, sizeof(*memory));
    if (memory == NULL) {
        perror("calloc");
        return EXIT_FAILURE;
    }
    pthread_rwlock_init(&memory->lock, NULL);

    /* What is left NULL (punch_hole, write_zeroes, copy_range) the library does by other means. */
    callbacks.user = memory;
    callbacks.preadv = memory_preadv;
    callbacks.pwritev = memory_pwritev;
    callbacks.flush = memory_flush;
    callbacks.length = memory_length;
    callbacks.truncate = memory_truncate;

    /* Making an image is done with the callbacks when it returns, so a `destroy` would come then: it is set later. */
    create.virtual_size = 16 * (uint64_t)MIB;
    must("create", qcr_create_callbacks(&callbacks, &create, &error));

    callbacks.destroy = memory_destroy;
    must("open", qcr_open_callbacks(&callbacks, NULL, NULL, &image, &error));
    must("start", qcr_start(image, &error));

    for (i = 0; i < 4; i++) {
        guests[i].image = image;
        guests[i].start = (uint64_t)i * 4 * MIB;
        guests[i].result = 0;
        if (pthread_create(&guests[i].thread, NULL, run_guest, &guests[i]) != 0) {
            perror("pthread_create");
            return EXIT_FAILURE;
        }
    }
    for (i = 0; i < 4; i++) {
        pthread_join(guests[i].thread, NULL);
        if (guests[i].result < 0) {
            fprintf(stderr, "guest %u: %s\n", i, strerror(-guests[i].result));
            return EXIT_FAILURE;
        }
    }
    must("flush", qcr_flush(image, &error));

    must("stats", qcr_get_stats(image, &stats, &error));
    printf("the device has %" PRIu64 " KiB, of which %" PRIu64 " KiB are free\n", stats.file_size / 1024,
           (stats.freed + stats.junk + stats.erased + stats.available) / 1024);
    must("compact", qcr_compact(image, NULL, NULL, NULL, &error));
    must("stats", qcr_get_stats(image, &stats, &error));
    printf("after compaction it has %" PRIu64 " KiB\n", stats.file_size / 1024);

    /* The same numbers for a monitoring system: ask for the length, then for the text. */
    must("prometheus", qcr_stats_prometheus(image, NULL, 0, &needed, &error));
    text = (char *)malloc(needed + 128);
    if (text == NULL) {
        perror("malloc");
        return EXIT_FAILURE;
    }
    must("prometheus", qcr_stats_prometheus(image, text, needed + 128, &needed, &error));
    printf("%.*s...\n", 80, text);
    free(text);

    must("close", qcr_close(image, &error));
    qcr_free(image);
    return EXIT_SUCCESS;
}
