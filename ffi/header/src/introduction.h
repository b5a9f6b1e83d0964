/* libqcowrecycle: a qcow2 block driver that keeps the image file as small as its live data while it is in use.
 *
 * SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Generated from ffi/src by `make header`: change the comments and declarations there.
 *
 * A hypervisor's guest deletes files and its file system discards what they occupied; in the qcow2 file that leaves
 * holes, and the file keeps its length. The driver's recycler moves clusters from the end of the file into the holes
 * and shortens the file, in the background, safe against a crash at any instant.
 *
 *     struct qcr_error error;
 *     struct qcr_image *image;
 *     QCR_INIT(error);
 *     if (qcr_open_path("disk.qcow2", NULL, NULL, &image, &error) < 0) {
 *         fprintf(stderr, "%s\n", error.message);
 *         exit(1);
 *     }
 *     qcr_start(image, NULL);                               the recycler
 *     qcr_write(image, data, 4096, 0, &error);              the guest, from any number of threads
 *     qcr_discard(image, 1 << 20, 1 << 20, &error);
 *     qcr_flush(image, &error);
 *     qcr_close(image, &error);
 *     qcr_free(image);
 *
 * Rules that hold everywhere, unless a function says otherwise:
 *
 * Errors    A function returns 0, or a negative errno and then has stored nothing but the details of the error.
 * Threads   Any thread may call anything at any time, on the same image too; only qcr_free() must come last. What
 *           several threads pass (a struct, a buffer) they must not use at once themselves. A handle does not survive
 *           fork(): the child must not use it.
 * Pointers  NULL is refused with -EINVAL unless its description allows it. What a call is given, it uses only until it
 *           returns; the exceptions, callbacks and their `user`, are used until their `destroy`.
 * Strings   End with a zero byte. Paths are any bytes, everything else is UTF-8.
 * Structs   Start with struct_size, which the caller sets to sizeof: QCR_INIT does. So programs and libraries of
 *           different age understand each other. A struct shorter than in the first release is refused with -EINVAL,
 *           one that asks for what the library does not know yet with -E2BIG; results it does not know become 0.
 * Flags     Unknown bits, and reserved members that are not 0, are refused with -EINVAL.
 * Units     Bytes, unless another unit is named.
 * Faults    Should the library find a fault of its own (a Rust panic), it never crosses into the program: the call, and
 *           every later one on that image, returns -ENOTRECOVERABLE, and nothing more is written to the image, which is
 *           then as after a power cut. Close it and open it again. Rust prints a
 *           line about it to stderr.
 * Unloading The library stays in memory after dlclose(), since its threads may live as long as the process.
 */
#ifndef QCOWRECYCLE_H
#define QCOWRECYCLE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Makes a struct of this header all zeroes, but for its size. Takes the struct itself, not a pointer to it. */
#define QCR_INIT(object) \
    (memset(&(object), 0, sizeof(object)), (void)((object).struct_size = (uint32_t)sizeof(object)))
