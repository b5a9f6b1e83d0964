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


/* ==============================================================================================================
 * Version
 *
 * The macros say what a program was compiled with, the functions what it runs with. Programs that were linked with
 * libqcowrecycle.so.0 run with every later libqcowrecycle.so.0.
 */

/* Changes when programs must be recompiled. */
#define QCR_VERSION_MAJOR 0

/* Changes when functions or struct members are added. */
#define QCR_VERSION_MINOR 1

/* Changes with every other release. */
#define QCR_VERSION_PATCH 0

/* The version of the library that is running: major << 16 | minor << 8 | patch. Any thread; cannot fail. */
uint32_t qcr_version(void);

/* The same as text, such as "0.1.0". The string is static: do not free it. Any thread; cannot fail. */
const char *qcr_version_string(void);

/* ==============================================================================================================
 * Errors
 *
 * A function that can fail returns 0 or a negative errno value. It also takes a `struct qcr_error *` as its last
 * argument, the caller's own, which it fills when it fails and leaves alone otherwise. NULL: the caller wants no
 * details. Nothing about errors is kept in the library or in a thread.
 *
 * The values have these meanings everywhere; a block callback's own error is passed on with its own value:
 *
 * | value            | meaning |
 * |------------------|---------|
 * | -EINVAL          | an argument, option or struct is unusable: `field` names it |
 * | -E2BIG           | a struct asks for something that only a newer library knows |
 * | -EUCLEAN         | the image contradicts its format: `field` and `offset` say where |
 * | -EOPNOTSUPP      | the image or the device needs something that is not supported; nothing was changed |
 * | -EROFS           | the image is open read-only, or an earlier failure made it so |
 * | -EAGAIN          | another process uses the image |
 * | -EPERM           | the image has a backing file that the options do not allow to be opened |
 * | -ENOKEY          | the image is encrypted, and the options name no passphrase |
 * | -EKEYREJECTED    | the passphrase is wrong; nothing was changed |
 * | -ENOSPC          | the file system or the device is full; nothing that was durable has changed |
 * | -EBADF           | the image is closed |
 * | -EBUSY           | something that excludes this call is under way |
 * | -ECANCELED       | the caller cancelled the work; the image is consistent |
 * | -ENOTRECOVERABLE | the library found a fault of its own: see qcr_close() |
 */

/* What went wrong, in detail. Set struct_size (see QCR_INIT) once; the struct can then be used again and again. */
struct qcr_error {
    /* sizeof(struct qcr_error), set by the caller. */
    uint32_t struct_size;
    /* The value the function returned: a negative errno. */
    int32_t code;
    /* The byte that the error speaks of: in the image file, or on the virtual disk for a request that does not fit
     * it; -1 if it speaks of none.
     */
    int64_t offset;
    /* The header field, table entry, option or argument that the error speaks of, or "". */
    char field[48];
    /* One line for a person to read, UTF-8. */
    char message[448];
};

/* ==============================================================================================================
 * Options
 *
 * How an image is opened and how its recycler behaves. Get the defaults with qcr_options_init(), then change
 * members or apply a configuration string. The struct is plain data: opening copies it.
 */

/* Option flag: refuse every change; nothing is written to the image. */
#define QCR_READ_ONLY 1

/* Option flag: accept discards. Set by default; without it, qcr_discard() fails with -EOPNOTSUPP. */
#define QCR_DISCARD 2

/* Option flag: check the whole image when it is opened, and refuse it if it is corrupt. */
#define QCR_CHECK_ON_CONNECT 4

/* Option flag: check the library's own invariants while it works. Slow; for tests. */
#define QCR_RUNTIME_ASSERTS 8

/* Option flag: transfers pass the host's page cache (O_DIRECT), for qcr_open_path(), which fails with -EOPNOTSUPP
 * where the file system has no such transfers. Memory and requests may have any alignment; what the kernel does not
 * take as it is costs a copy, so page-aligned memory is best. Ignored on block callbacks.
 */
#define QCR_DIRECT 16

/* Option flag: give the space of clusters that were freed, and stay in the file, back to the host by punching holes,
 * where the file or the callbacks can do that. Set by default.
 */
#define QCR_PUNCH_JUNK 32

/* Backing file: an image that has one is refused with -EPERM. The default. */
#define QCR_BACKING_REFUSE 0

/* Backing file: not opened. A request that needs its contents fails, everything else works. */
#define QCR_BACKING_SKIP 1

/* Backing file: opened read-only, in the format that the image records (never guessed), and so are the backing
 * files of backing files. For images from a source you trust: the image names the files.
 */
#define QCR_BACKING_ALLOW 2

/* External data file (which holds the guest's data): an image that has one is refused with -EPERM. The default. */
#define QCR_DATA_FILE_REFUSE 0

/* External data file: not opened. Requests of guests fail, everything else works, compacting included. */
#define QCR_DATA_FILE_SKIP 1

/* External data file: opened, for writing too unless QCR_READ_ONLY is set, and locked as the image is. For images from
 * a source you trust: the image names the file.
 */
#define QCR_DATA_FILE_ALLOW 2

/* Format of a backing file: none is assumed; where an image records none, it is refused. The default. */
#define QCR_FORMAT_RECORDED 0

/* Format of a backing file: the bytes of the disk, one after another. */
#define QCR_FORMAT_RAW 1

/* Format of a backing file: another image. */
#define QCR_FORMAT_QCOW2 2

/* How serious a message is: something failed. */
#define QCR_LOG_ERROR 1

/* How serious a message is: something unexpected that the library handled. */
#define QCR_LOG_WARNING 2

/* How serious a message is: a milestone of the recycler's work. */
#define QCR_LOG_INFO 3

/* How serious a message is: a step of it. */
#define QCR_LOG_DEBUG 4

/* How to open an image. Sizes are in bytes, times in milliseconds. */
struct qcr_options {
    /* sizeof(struct qcr_options), set by the caller. */
    uint32_t struct_size;
    /* QCR_READ_ONLY, QCR_DISCARD, QCR_CHECK_ON_CONNECT, QCR_RUNTIME_ASSERTS, QCR_DIRECT, QCR_PUNCH_JUNK. */
    uint32_t flags;
    /* Bytes of zeroed clusters that the recycler keeps ready for new guest writes. */
    uint64_t keep_erased;
    /* The recycler compacts on its own when more bytes than this are free inside the file; 0: only when asked. */
    uint64_t compact_after_unmaps;
    /* How long the amount of free space must not have grown before it does. If it grows all the time, it does after twelve times
     * as long.
     */
    uint64_t settle_ms;
    /* The recycler flushes this long after the first unflushed work, unless the guest flushes first. */
    uint64_t flush_ms;
    /* The most bytes a second that the recycler copies and erases; 0: no limit. */
    uint64_t rate_limit;
    /* Memory for cached L2 tables. */
    uint64_t l2_cache_size;
    /* QCR_BACKING_REFUSE, QCR_BACKING_SKIP or QCR_BACKING_ALLOW. */
    uint32_t backing;
    /* Format of backing files whose images do not record one: QCR_FORMAT_RECORDED, QCR_FORMAT_RAW or
     * QCR_FORMAT_QCOW2.
     */
    uint32_t backing_format;
    /* Where relative names of backing files and of the data file start. NULL: in the directory of the image's own
     * path; an image on block callbacks has none, and must be given one if backing files are allowed.
     */
    const char *backing_directory;
    /* The image's name in statistics and messages, UTF-8. */
    char id[64];
    /* QCR_DATA_FILE_REFUSE, QCR_DATA_FILE_SKIP or QCR_DATA_FILE_ALLOW. Not asked by
     * qcr_open_callbacks_with_data().
     */
    uint32_t data_file;
    /* 0. */
    uint32_t reserved;
    /* The passphrase of an encrypted image, and of encrypted images behind it: `passphrase_length` bytes, any bytes. NULL: none;
     * an encrypted image can then be looked at, checked, discarded from and made shorter, and neither read nor written. Opening
     * copies it, and has wiped the copy when it returns. With QEMU's first encryption (AES) nothing tells whether it is right.
     */
    const void *passphrase;
    /* Length of the passphrase in bytes, 0 if it is NULL. */
    uint64_t passphrase_length;
};

/* Takes a message. It is called from any thread, also from several at once, and may call of the library what block
 * callbacks may. It must return by itself (no longjmp, no C++ exception).
 *
 * `level` is one of QCR_LOG_ERROR to QCR_LOG_DEBUG; `message` is one line of UTF-8, valid during the call.
 */
typedef void (*qcr_log_fn)(void *user, uint32_t level, const char *message);

/* Where an image's messages go. Opening copies the struct, and the `destroy` rule of struct qcr_block_callbacks
 * holds.
 */
struct qcr_log {
    /* sizeof(struct qcr_log), set by the caller. */
    uint32_t struct_size;
    /* The least serious level that is wanted; 0 stands for QCR_LOG_WARNING. */
    uint32_t level;
    /* Passed to the functions below. */
    void *user;
    /* Called exactly once, when `user` is not used any more. May be NULL. */
    void (*destroy)(void *user);
    /* Takes a message. */
    qcr_log_fn log;
};

/* Sets `options` to the defaults. Its struct_size must have been set (see QCR_INIT). Any thread.
 *
 * Errors: -EINVAL.
 */
int qcr_options_init(struct qcr_options *options, struct qcr_error *error);

/* Applies a configuration string `key=value;key=value;...` to `options`, which must have been initialised. Any
 * thread.
 *
 * | key                    | value |
 * |------------------------|-------|
 * | `direct`, `discard`, `punch_junk`, `read_only`, `check_on_connect`, `runtime_asserts` | `true`, `false`, `1` or `0` |
 * | `keep_erased`          | in sectors of 512 bytes (not in bytes) |
 * | `compact_after_unmaps` | in sectors of 512 bytes (not in bytes); 0: only when asked |
 * | `settle_ms`, `flush_ms`| milliseconds |
 * | `rate_limit`           | bytes a second; 0: no limit |
 * | `l2_cache`             | bytes |
 * | `id`                   | at most 63 bytes |
 *
 * Empty items are skipped.
 *
 * Errors: -EINVAL for an unknown key or an unusable value, named in `error->field`; `options` has not changed then.
 */
int qcr_options_parse(struct qcr_options *options, const char *config, struct qcr_error *error);

/* ==============================================================================================================
 * Block callbacks
 *
 * The bytes of an image where the program keeps them: a volume, a network store, memory. (For a file on the host,
 * qcr_open_path() does it all.)
 *
 * - All offsets and lengths are in bytes. Transfers are whole: a callback returns 0 when everything was moved, or a
 *   negative errno; any other value counts as -EIO. The error reaches the call of the library that needed the
 *   transfer, and with it the program.
 * - Callbacks are called from the threads that call the library and from the recycler's thread, several at once. No
 *   lock of the library is held meanwhile: a callback may take its time, and may call the library again, on other
 *   images anything, on its own image qcr_get_info(), qcr_get_stats() and qcr_stats_prometheus().
 * - They must return by themselves: no longjmp, no C++ exception may leave them.
 * - The library never asks for bytes past the length it knows: what `length` said at the start and `truncate` made
 *   since.
 * - Until a `flush` that began later has succeeded, what a completed call did may be lost in a power cut, in any
 *   order and in parts of 512 bytes. After that it may not. If a `flush` fails, the image becomes read-only.
 */

/* The most areas of memory that one callback is given. */
#define QCR_IOV_MAX 64

/* Something that was submitted to the program. */
struct qcr_io;

/* How the library reaches the bytes of an image. The library copies the struct. Members marked so may be NULL. */
struct qcr_block_callbacks {
    /* sizeof(struct qcr_block_callbacks), set by the caller. */
    uint32_t struct_size;
    /* 0. */
    uint32_t flags;
    /* Passed to every callback. */
    void *user;
    /* Called exactly once when no callback will be called any more, so that `user` can be freed: at the latest
     * when qcr_free() of the image returns; and before the function that took the struct returns, if that fails
     * for whatever reason or makes no image (qcr_create_callbacks(), qcr_check_callbacks()). The one exception is
     * a struct_size too small for this member. May be NULL.
     */
    void (*destroy)(void *user);
    /* Fills `iovcnt` areas (1 to QCR_IOV_MAX), in order, from `offset`. NULL only beside `submit_preadv`. */
    int (*preadv)(void *user, const struct iovec *iov, int iovcnt, uint64_t offset);
    /* Stores `iovcnt` areas (1 to QCR_IOV_MAX), in order, at `offset`. The guest may change the memory meanwhile.
     * NULL only beside `submit_pwritev`, or for an image opened with QCR_READ_ONLY.
     */
    int (*pwritev)(void *user, const struct iovec *iov, int iovcnt, uint64_t offset);
    /* Makes everything durable that completed before. NULL only beside `submit_flush`, or for an image opened with
     * QCR_READ_ONLY.
     */
    int (*flush)(void *user);
    /* Stores the device's length in `*length`. */
    int (*length)(void *user, uint64_t *length);
    /* Makes the device `length` bytes long, longer or shorter. New bytes read as zeroes, also where there were
     * others before the device was once shortened. NULL: the device's length is fixed; qcr_get_stats() then tells
     * how much of it is in use.
     */
    int (*truncate)(void *user, uint64_t length);
    /* Makes a range read as zeroes and gives its space back. May be NULL, and may return -EOPNOTSUPP. */
    int (*punch_hole)(void *user, uint64_t offset, uint64_t length);
    /* Makes a range read as zeroes and keeps its space, cheaper than by writing. May be NULL, and may return
     * -EOPNOTSUPP.
     */
    int (*write_zeroes)(void *user, uint64_t offset, uint64_t length);
    /* Copies `length` bytes inside the device; the ranges do not overlap. May be NULL, and may return -EOPNOTSUPP. */
    int (*copy_range)(void *user, uint64_t from, uint64_t to, uint64_t length);
    /* Begins what `preadv` does, and returns; qcr_io_complete() tells of the end. This and the next two: see
     * "Asynchronous block callbacks". May be NULL.
     */
    void (*submit_preadv)(void *user, const struct iovec *iov, int iovcnt, uint64_t offset,
                          struct qcr_io *io);
    /* Begins what `pwritev` does. May be NULL. */
    void (*submit_pwritev)(void *user, const struct iovec *iov, int iovcnt, uint64_t offset,
                           struct qcr_io *io);
    /* Begins what `flush` does: for what completed before this was called. May be NULL. */
    void (*submit_flush)(void *user, struct qcr_io *io);
};

/* ==============================================================================================================
 * Creating images
 */

/* Creation flag: let refcounts go stale while the image is open (version 3 only). */
#define QCR_CREATE_LAZY_REFCOUNTS 1

/* Creation flag: replace an existing file, whatever it holds. */
#define QCR_CREATE_REPLACE 2

/* Creation flag: extended L2 entries, so that clusters are allocated in 32 parts (version 3 only, clusters of 16 KiB at
 * least).
 */
#define QCR_CREATE_EXTENDED_L2 4

/* Creation flag: the external data file is to read as the disk does, without the image, at any time: discards make it
 * zero. Not with a backing file.
 */
#define QCR_CREATE_DATA_FILE_RAW 8

/* What a new image is to be like. All zeroes but struct_size and virtual_size: as QEMU makes them by default. */
struct qcr_create_options {
    /* sizeof(struct qcr_create_options), set by the caller. */
    uint32_t struct_size;
    /* QCR_CREATE_LAZY_REFCOUNTS, QCR_CREATE_REPLACE, QCR_CREATE_EXTENDED_L2, QCR_CREATE_DATA_FILE_RAW. */
    uint32_t flags;
    /* Size of the virtual disk in bytes, a multiple of 512. */
    uint64_t virtual_size;
    /* Cluster size in bytes, a power of two from 512 to 2 MiB; 0: 64 KiB. */
    uint64_t cluster_size;
    /* Width of a refcount in bits: 1, 2, 4, 8, 16, 32 or 64; 0: 16. */
    uint32_t refcount_bits;
    /* Of the format, 2 or 3; 0: 3. */
    uint32_t version;
    /* The backing file's name to record, UTF-8, and its format ("raw" or "qcow2"), or both NULL. The file is not
     * opened.
     */
    const char *backing_file;
    /* See backing_file. */
    const char *backing_format;
    /* The name of an external data file to record, UTF-8, relative to the image, or NULL: the guest's data is kept
     * there, not in the image (version 3 only). qcr_create_path() makes it as it makes the image. QEMU takes a relative
     * name from its own working directory.
     */
    const char *data_file;
};

/* Makes a new image in the file `path` and closes it. Any thread.
 *
 * Errors: -EEXIST if there is a file already, and QCR_CREATE_REPLACE is not set; -EAGAIN if it is an image in use;
 * -EINVAL names the unusable option. When it fails, a file that this call made is removed again.
 */
int qcr_create_path(const char *path, const struct qcr_create_options *options, struct qcr_error *error);

/* Writes a new image to block callbacks, whatever they held before; then `destroy` is called. Any thread.
 *
 * Errors: -EINVAL names the unusable option; -EOPNOTSUPP if the device is too short and cannot be made longer; the
 * callbacks' own.
 */
int qcr_create_callbacks(const struct qcr_block_callbacks *callbacks,
                         const struct qcr_create_options *options, struct qcr_error *error);

/* Writes a new image with an external data file to block callbacks, whatever they held before: the data file to those of
 * `data`; then `destroy` of both is called. Any thread.
 *
 * Errors: as qcr_create_callbacks(); -EINVAL without a name for the data file.
 */
int qcr_create_callbacks_with_data(const struct qcr_block_callbacks *callbacks,
                                   const struct qcr_block_callbacks *data,
                                   const struct qcr_create_options *options, struct qcr_error *error);

/* ==============================================================================================================
 * Opening and closing images
 *
 * The life of an image:
 *
 *   qcr_open_path() or qcr_open_callbacks()    the image can be used; its recycler rests
 *   qcr_start()                                the recycler works in the background
 *   qcr_readv(), qcr_writev(), qcr_discard()   from any number of threads
 *   qcr_close()                                everything is durable, or the error says what is not
 *   qcr_free()                                 the handle is gone, and `destroy` has run
 */

/* An open image. */
struct qcr_image;

/* Opens the image in the file (or on the block device) `path`, and locks it as QEMU does. Any thread.
 *
 * `options` and `log` may be NULL: the defaults, and no messages. On success `*image` is the caller's to
 * qcr_free().
 *
 * Errors: -EUCLEAN if the image contradicts its format; -EOPNOTSUPP names the feature that is not supported; -EPERM if
 * it has a backing file or an external data file that the options do not allow; -EAGAIN if another process uses it;
 * those of open(2) and read(2). An image that is refused is not changed. `log->destroy` has been called when this fails.
 */
int qcr_open_path(const char *path, const struct qcr_options *options, const struct qcr_log *log,
                  struct qcr_image **image, struct qcr_error *error);

/* Opens the image on block callbacks. Any thread; the callbacks are first called by this very call.
 *
 * `options` and `log` may be NULL: the defaults, and no messages. On success `*image` is the caller's to
 * qcr_free().
 *
 * Errors: as qcr_open_path(), and the callbacks' own. `destroy` of `callbacks` and of `log` have been called when this
 * fails.
 */
int qcr_open_callbacks(const struct qcr_block_callbacks *callbacks, const struct qcr_options *options,
                       const struct qcr_log *log, struct qcr_image **image, struct qcr_error *error);

/* Opens the image on block callbacks whose external data file is on the block callbacks `data`. Any thread; the
 * callbacks are first called by this very call.
 *
 * `options` and `log` may be NULL: the defaults, and no messages. On success `*image` is the caller's to
 * qcr_free().
 *
 * Errors: as qcr_open_callbacks(); -EINVAL if the image has no external data file. `destroy` of `callbacks`, of `data`
 * and of `log` have been called when this fails.
 */
int qcr_open_callbacks_with_data(const struct qcr_block_callbacks *callbacks,
                                 const struct qcr_block_callbacks *data, const struct qcr_options *options,
                                 const struct qcr_log *log, struct qcr_image **image,
                                 struct qcr_error *error);

/* Stops the recycler, waits for the calls under way, makes everything durable and closes the image. Any thread,
 * also while others use the image: their later calls fail with -EBADF. Closing twice does nothing. Not from a
 * callback of the same image.
 *
 * Errors: the device's, or -ENOTRECOVERABLE after a fault of the library: from that fault on nothing more is
 * written to the image, which is as after a power cut and can be opened again. The image is closed whatever the
 * error.
 */
int qcr_close(struct qcr_image *image, struct qcr_error *error);

/* Frees an image, and closes it first if that has not been done; an error then only reaches the log. `destroy` of
 * the callbacks and of the log have run when this returns. NULL is ignored.
 *
 * Any thread, but it must be the last call on the image: no other may be under way. Not from a callback of the
 * same image.
 */
void qcr_free(struct qcr_image *image);

/* ==============================================================================================================
 * The guest's disk
 *
 * Offsets and lengths are in bytes on the virtual disk and multiples of 512 (-EINVAL otherwise, and for a range
 * that reaches past the end). Any number of threads may call at once. Two calls whose ranges overlap have no order
 * between them: one that must see another begins after it has returned.
 *
 * The memory may belong to a guest that changes it meanwhile: the library never trusts it twice.
 */

/* qcr_write_zeroes(): clusters in the range may be freed. */
#define QCR_ZERO_MAY_UNMAP 1

/* qcr_resize(): the disk may become smaller, and what is cut off is lost. */
#define QCR_RESIZE_SHRINK 1

/* Extent: stored in the image file. */
#define QCR_EXTENT_DATA 1

/* Extent: reads as zeroes, whatever the backing file has. */
#define QCR_EXTENT_ZERO 2

/* Extent: not allocated; reads as the backing file does, or as zeroes without one. */
#define QCR_EXTENT_UNALLOCATED 3

/* Extent: stored in the image file, compressed. */
#define QCR_EXTENT_COMPRESSED 4

/* How a range of the disk is stored. */
struct qcr_extent {
    /* sizeof(struct qcr_extent), set by the caller. */
    uint32_t struct_size;
    /* One of QCR_EXTENT_DATA to QCR_EXTENT_COMPRESSED; a later version may know more. */
    uint32_t kind;
    /* In bytes, from the offset that was asked for. */
    uint64_t length;
    /* QCR_EXTENT_DATA: where the range starts in the image file, in bytes; until the recycler moves it. Otherwise
     * 0.
     */
    uint64_t host_offset;
};

/* Fills `iovcnt` areas of memory, in order, from byte `offset` of the disk. When it fails, their contents are
 * undefined.
 *
 * `iovcnt` may be any number from 0 on. The array must not change during the call.
 *
 * Errors: -EUCLEAN if the image contradicts its format where this looks; -EBADF; the device's.
 */
int qcr_readv(struct qcr_image *image, const struct iovec *iov, int iovcnt, uint64_t offset,
              struct qcr_error *error);

/* Stores `iovcnt` areas of memory, in order, at byte `offset` of the disk. It is durable when a qcr_flush() that
 * began later has succeeded. When it fails, the range may hold the old bytes, the new, or in part both.
 *
 * Errors: as qcr_readv(), and -EROFS, -ENOSPC.
 */
int qcr_writev(struct qcr_image *image, const struct iovec *iov, int iovcnt, uint64_t offset,
               struct qcr_error *error);

/* qcr_readv() into one area of `count` bytes. */
int qcr_read(struct qcr_image *image, void *buffer, size_t count, uint64_t offset, struct qcr_error *error);

/* qcr_writev() from one area of `count` bytes. */
int qcr_write(struct qcr_image *image, const void *buffer, size_t count, uint64_t offset,
              struct qcr_error *error);

/* Stores `count` bytes of whole clusters at byte `offset`, compressed as far as that saves room: for programs that make
 * images. `offset` is a multiple of the cluster size, and so is `count`, unless the disk ends there. A later qcr_write() to
 * such a cluster stores it plainly again. Otherwise as qcr_write().
 *
 * Errors: as qcr_writev(); -EINVAL for pieces of clusters.
 */
int qcr_write_compressed(struct qcr_image *image, const void *buffer, size_t count, uint64_t offset,
                         struct qcr_error *error);

/* Tells the image that the guest does not need a range any more: it reads as zeroes from now on. Whole clusters in it are
 * freed for the recycler; pieces of clusters are overwritten with zeroes where they hold data. After a power cut before
 * the next flush, the range may read as before.
 *
 * Errors: -EOPNOTSUPP without QCR_DISCARD; otherwise as qcr_writev().
 */
int qcr_discard(struct qcr_image *image, uint64_t offset, uint64_t length, struct qcr_error *error);

/* Makes a range read as zeroes, whatever the backing file has there. `flags`: 0 or QCR_ZERO_MAY_UNMAP.
 *
 * Errors: as qcr_writev().
 */
int qcr_write_zeroes(struct qcr_image *image, uint64_t offset, uint64_t length, uint32_t flags,
                     struct qcr_error *error);

/* Makes everything durable that completed before this call. After a failed flush the image is read-only, since
 * nobody can say what of it became durable: close it and open it again.
 *
 * Errors: the device's; -EROFS after an earlier failure; -EBADF.
 */
int qcr_flush(struct qcr_image *image, struct qcr_error *error);

/* Makes the virtual disk `size` bytes large. What is new reads as zeroes. `flags`: 0 or QCR_RESIZE_SHRINK; without
 * it, a smaller size is refused with -EINVAL.
 *
 * Errors: as qcr_writev(); -EOPNOTSUPP if the image has something that forbids it, such as snapshots.
 */
int qcr_resize(struct qcr_image *image, uint64_t size, uint32_t flags, struct qcr_error *error);

/* Tells how the bytes from `offset` on are stored, at most `length` of them (not 0).
 *
 * Errors: as qcr_readv().
 */
int qcr_get_extent(struct qcr_image *image, uint64_t offset, uint64_t length, struct qcr_extent *extent,
                   struct qcr_error *error);

/* ==============================================================================================================
 * Asynchronous queues
 *
 * Requests that go on by themselves, many at a time, on one thread:
 *
 *     struct qcr_queue *queue;
 *     struct qcr_completion done[32];
 *     size_t count, i;
 *     qcr_queue_create(image, NULL, &queue, &error);
 *     qcr_queue_write(queue, data, 4096, 0, 1, &error);     1 is for the program to know the request again
 *     qcr_queue_read(queue, more, 4096, 65536, 2, &error);
 *     while (requests are missing) {
 *         qcr_queue_reap(queue, done, 32, 1, -1, &count, &error);
 *         for (i = 0; i < count; i++)
 *             use done[i].user_data and done[i].result
 *     }
 *     qcr_queue_free(queue);
 *
 * - Each request that was submitted is completed exactly once, and whatever goes wrong with it is the result in its
 *   completion, a range that does not fit the disk included. The submitting call itself fails only if it was given
 *   something unusable (-EINVAL), the queue is full (-EBUSY), or the library found a fault of its own; then there will
 *   be no completion.
 * - The memory of a request (not the array of areas) is in use until its completion has been reaped, or the queue is
 *   freed. It may belong to a guest that changes it meanwhile.
 * - Requests are carried out side by side and completed in any order. One that must see another is submitted after
 *   the other's completion. A flush covers every request that was completed when it was submitted.
 * - On a host file the kernel carries transfers out (io_uring), and takes them many at a time: when qcr_queue_reap() or
 *   qcr_queue_arm() is called, or qcr_queue_kick(). Where the kernel refuses, and for whatever has to wait for something
 *   else, threads of the library do the work. On block callbacks these threads call them, but for transfers that the
 *   program begins itself: see "Asynchronous block callbacks".
 * - An image may have several queues. A queue is for one thread at a time; others that call it wait. All its calls but
 *   qcr_queue_reap() and qcr_queue_free() return at once.
 * - Nothing waits for a program that does not reap: the image can be compacted, resized and closed by the very thread
 *   that has submitted something. After the close, what is submitted completes with -EBADF. (With asynchronous block
 *   callbacks, not by the thread that completes them: what is closed waits for what the program has begun.)
 * - A queue must be freed before its image. It keeps the image's file open and locked until then.
 * - While requests are under way on io_uring, the kernel may interrupt what the thread that submitted them waits for:
 *   a call such as epoll_wait(2) then fails with EINTR, and is to be made again.
 */

/* Queue flag: transfers are carried out by threads, even where the kernel would do it. */
#define QCR_QUEUE_THREADS 1

/* In struct qcr_queue_info: the kernel carries transfers out. */
#define QCR_QUEUE_IO_URING 2

/* A queue of requests to an image. */
struct qcr_queue;

/* What a queue is to be like. All zeroes but struct_size: the defaults. */
struct qcr_queue_options {
    /* sizeof(struct qcr_queue_options), set by the caller. */
    uint32_t struct_size;
    /* 0 or QCR_QUEUE_THREADS. */
    uint32_t flags;
    /* The most requests that are submitted and not reaped: up to 16384; 0: 128. */
    uint32_t depth;
    /* The most threads that the queue uses for what has to wait; 0: 16. They are started when they are needed. */
    uint32_t threads;
};

/* The end of a request. As one of an array it never grows. */
struct qcr_completion {
    /* What the request was submitted with. */
    uint64_t user_data;
    /* 0 or a negative errno: what the call without a queue would have returned. */
    int32_t result;
    /* 0. */
    uint32_t reserved;
};

/* What a queue is doing. */
struct qcr_queue_info {
    /* sizeof(struct qcr_queue_info), set by the caller. */
    uint32_t struct_size;
    /* 0 or QCR_QUEUE_IO_URING. */
    uint32_t flags;
    /* Requests that were submitted and not reaped. */
    uint64_t pending;
};

/* Makes a queue over an open image. `options` may be NULL: the defaults. On success `*queue` is the caller's to
 * qcr_queue_free(). Any thread.
 *
 * Errors: -EINVAL; -EMFILE and the like if there is no descriptor left.
 */
int qcr_queue_create(struct qcr_image *image, const struct qcr_queue_options *options,
                     struct qcr_queue **queue, struct qcr_error *error);

/* Submits what qcr_readv() does. The array of areas is not used any more when this returns; the memory is.
 *
 * Errors: -EINVAL, -EBUSY.
 */
int qcr_queue_readv(struct qcr_queue *queue, const struct iovec *iov, int iovcnt, uint64_t offset,
                    uint64_t user_data, struct qcr_error *error);

/* Submits what qcr_writev() does. The array of areas is not used any more when this returns; the memory is.
 *
 * Errors: -EINVAL, -EBUSY.
 */
int qcr_queue_writev(struct qcr_queue *queue, const struct iovec *iov, int iovcnt, uint64_t offset,
                     uint64_t user_data, struct qcr_error *error);

/* qcr_queue_readv() into one area of `count` bytes. */
int qcr_queue_read(struct qcr_queue *queue, void *buffer, size_t count, uint64_t offset, uint64_t user_data,
                   struct qcr_error *error);

/* qcr_queue_writev() from one area of `count` bytes. */
int qcr_queue_write(struct qcr_queue *queue, const void *buffer, size_t count, uint64_t offset,
                    uint64_t user_data, struct qcr_error *error);

/* Submits what qcr_discard() does.
 *
 * Errors: -EINVAL, -EBUSY.
 */
int qcr_queue_discard(struct qcr_queue *queue, uint64_t offset, uint64_t length, uint64_t user_data,
                      struct qcr_error *error);

/* Submits what qcr_write_zeroes() does. `flags`: 0 or QCR_ZERO_MAY_UNMAP.
 *
 * Errors: -EINVAL, -EBUSY.
 */
int qcr_queue_write_zeroes(struct qcr_queue *queue, uint64_t offset, uint64_t length, uint32_t flags,
                           uint64_t user_data, struct qcr_error *error);

/* Submits a flush: what it covers are the requests of all queues, and the calls, that were completed before it was
 * submitted.
 *
 * Errors: -EINVAL, -EBUSY.
 */
int qcr_queue_flush(struct qcr_queue *queue, uint64_t user_data, struct qcr_error *error);

/* Hands what was submitted to the kernel now, for a program that does something else before it reaps.
 *
 * Errors: -EINVAL.
 */
int qcr_queue_kick(struct qcr_queue *queue, struct qcr_error *error);

/* Stores completions in the array `completions`, which has room for `max`, and their number in `*count`.
 *
 * Waits until `min` are there (or as many as were submitted, if they are fewer), but no longer than `timeout_us`
 * microseconds: 0 does not wait, a negative value waits for as long as it takes. Works on an image with a fault of the
 * library's own, too, so that the memory of requests can be had back.
 *
 * Errors: -EINVAL.
 */
int qcr_queue_reap(struct qcr_queue *queue, struct qcr_completion *completions, size_t max, size_t min,
                   int64_t timeout_us, size_t *count, struct qcr_error *error);

/* Gives the details of the failed request that was reaped last: they are stored in `error`, and its result is
 * returned; 0 if none has failed.
 *
 * Errors: as said; -EINVAL.
 */
int qcr_queue_failure(struct qcr_queue *queue, struct qcr_error *error);

/* Stores in `*fd` the queue's eventfd, for a program that sleeps in poll(2), epoll_wait(2) or the like. It belongs to
 * the queue, and is the same each time.
 *
 * It is written only between a qcr_queue_arm() and the next qcr_queue_reap(), which also makes it unreadable again; the
 * program need not read it. Now and then it becomes readable although there is nothing to reap; the program then arms
 * the queue anew. It is always readable when there is something.
 *
 * Errors: -EINVAL; -EMFILE and the like if there is no descriptor left.
 */
int qcr_queue_eventfd(struct qcr_queue *queue, int *fd, struct qcr_error *error);

/* To be called before sleeping on the eventfd: stores in `*ready` how many completions are there already. If there are
 * none, the eventfd becomes readable with the next one. Hands what was submitted to the kernel.
 *
 * Errors: -EINVAL; -EMFILE and the like if there is no descriptor left.
 */
int qcr_queue_arm(struct qcr_queue *queue, size_t *ready, struct qcr_error *error);

/* Tells what a queue is doing.
 *
 * Errors: -EINVAL.
 */
int qcr_queue_get_info(struct qcr_queue *queue, struct qcr_queue_info *info, struct qcr_error *error);

/* Waits until everything that was submitted has ended, and frees the queue; completions that were not reaped are lost.
 * NULL is ignored. It must be the last call on the queue, and not from a callback of its image.
 */
void qcr_queue_free(struct qcr_queue *queue);

/* ==============================================================================================================
 * Asynchronous block callbacks
 *
 * For a program whose own I/O is asynchronous: the library begins what it needs with `submit_preadv`, `submit_pwritev`
 * and `submit_flush` of struct qcr_block_callbacks, and the program tells of the end when it comes.
 *
 *     static void submit_preadv(void *user, const struct iovec *iov, int iovcnt, uint64_t offset, struct qcr_io *io)
 *     {
 *         begin_to_read(user, iov, iovcnt, offset, io);     the program's own; `io` for it to know the transfer again
 *     }
 *
 *     static void has_been_read(struct qcr_io *io, int result)
 *     {
 *         qcr_io_complete(io, result);
 *     }
 *
 * - Each is completed exactly once, on any thread, in any order, also before the submitting callback returns. Until
 *   then the array of areas and the memory stay as they are; from then on the program uses neither, nor `io`.
 * - Failures are told in the same way: a submitting callback returns nothing.
 * - A queue begins the transfers of its requests so, and needs no thread for them: see "Asynchronous queues". What has to
 *   wait for something else (a table that is not in memory, a cluster to be allocated, a flush) is done by its threads.
 * - Everything else that the library reads, writes and flushes is done by `preadv`, `pwritev` and `flush`. Where one of
 *   these is NULL, the submitting callback of the same name serves instead, and the thread that called the library
 *   sleeps until the end is told: it must come from another one, or from within the submitting callback.
 * - The rules for other block callbacks hold. Besides, a queue is held while it submits, so a submitting callback must
 *   not call functions of the queue, nor wait for a thread that does.
 * - `destroy` is called after the last end was told, but perhaps before that call of qcr_io_complete() returns.
 */

/* Tells the library that what was submitted with `io` has ended. `result` is 0 when everything was done, or a negative
 * errno; any other value counts as -EIO. Any thread; waits for nothing. NULL is ignored.
 */
void qcr_io_complete(struct qcr_io *io, int result);

/* ==============================================================================================================
 * The recycler
 *
 * While it runs, the recycler keeps zeroed clusters ready for the guest, moves clusters from the end of the file
 * into free ones nearer its start, and shortens the file. It gives way to the guest: a guest never waits for it.
 * An error in its work is logged, counted in the statistics, and tried again.
 *
 * All calls from any thread.
 */

/* How far a compaction is. */
struct qcr_progress {
    /* As much of the struct as the library fills, in bytes. */
    uint32_t struct_size;
    /* 0. */
    uint32_t reserved;
    /* Clusters handled so far: moved, or found in use by the guest and left. */
    uint64_t done;
    /* Clusters that are to be handled, as far as is known: while the tables are searched, one more than are done. */
    uint64_t total;
    /* Length of the image file now, in bytes. */
    uint64_t file_size;
};

/* Is told how far a compaction is, on the thread that called qcr_compact(). `progress` is valid during the call. Returns
 * 0 to go on, anything else to cancel. It may read, write, discard and flush, ask for statistics, pause and resume: guests
 * go on meanwhile. What waits until the compaction has come to a rest would wait for ever: on the same image it must not
 * compact, compress, check, resize, make, delete or apply a snapshot, change a bitmap, stop, close or free. It must return
 * by itself (no longjmp, no C++ exception).
 */
typedef int (*qcr_progress_fn)(void *user, const struct qcr_progress *progress);

/* What a compaction did. */
struct qcr_compact_report {
    /* sizeof(struct qcr_compact_report), set by the caller. */
    uint32_t struct_size;
    /* 0. */
    uint32_t reserved;
    /* Length of the image file before, in bytes. */
    uint64_t file_size_before;
    /* Length of the image file after, in bytes. On a device of fixed length: how much of it is in use. */
    uint64_t file_size_after;
    /* Bytes of clusters moved. */
    uint64_t moved;
    /* Moves that a guest write or discard cancelled. */
    uint64_t cancelled;
};

/* Starts the recycler. Does nothing if it runs already.
 *
 * Errors: -EROFS; -EBADF; -EAGAIN or -ENOMEM if no thread can be started.
 */
int qcr_start(struct qcr_image *image, struct qcr_error *error);

/* Lets the recycler finish the step it is at, then rest; does not wait for that. Does nothing if it does not run. */
int qcr_pause(struct qcr_image *image, struct qcr_error *error);

/* Lets a paused recycler go on. Does nothing if it is not paused. */
int qcr_resume(struct qcr_image *image, struct qcr_error *error);

/* Stops the recycler and waits until it has ended; what it was moving stays where it was. It can be started again.
 * Does nothing if it does not run. Not from a callback of the same image.
 */
int qcr_stop(struct qcr_image *image, struct qcr_error *error);

/* Compacts the image now, on this thread, while the guest goes on using it and whether or not the recycler runs.
 *
 * `progress` is called with `user` from time to time; NULL: nobody is interested. `report` may be NULL.
 *
 * A compaction that is under way already is not waited for: the two take turns, batch by batch.
 *
 * Errors: -ECANCELED if `progress` cancelled it (the image is consistent, and what was moved stays moved); -EROFS;
 * -EBADF; -EAGAIN or -ENOMEM if no thread could be started; the device's.
 */
int qcr_compact(struct qcr_image *image, qcr_progress_fn progress, void *user,
                struct qcr_compact_report *report, struct qcr_error *error);

/* Compresses what the disk holds, on this thread, while the guest goes on using it: clusters that are stored plainly, that no
 * snapshot shares, and that get smaller by that. For data that is seldom written. The file gets shorter with the next
 * compaction. `progress` as in qcr_compact(), with clusters of the disk. `compressed` may be NULL: gets how many bytes of the
 * disk are compressed now that were not.
 *
 * Errors: as qcr_compact(); -EOPNOTSUPP if refcounts are of one bit.
 */
int qcr_compress(struct qcr_image *image, qcr_progress_fn progress, void *user, uint64_t *compressed,
                 struct qcr_error *error);

/* ==============================================================================================================
 * Statistics, checks, description
 *
 * All calls from any thread, and while the image is in use. qcr_get_info(), qcr_get_stats() and
 * qcr_stats_prometheus() do no I/O and may be called from every callback.
 */

/* Image flag: made with lazy refcounts. */
#define QCR_INFO_LAZY_REFCOUNTS 1

/* Image flag: the handle refuses changes. */
#define QCR_INFO_READ_ONLY 2

/* Image flag: L2 entries are extended, so that clusters are allocated in 32 parts. */
#define QCR_INFO_EXTENDED_L2 4

/* Image flag: the guest's data is in an external data file. */
#define QCR_INFO_DATA_FILE 8

/* Image flag: the external data file reads as the disk does, without the image. */
#define QCR_INFO_RAW_DATA_FILE 16

/* Image flag: guest data is encrypted. */
#define QCR_INFO_ENCRYPTED 32

/* Repair: nothing, only look. */
#define QCR_REPAIR_NONE 0

/* Repair: leaked clusters. */
#define QCR_REPAIR_LEAKS 1

/* Repair: everything that can be repaired without a risk to guest data. */
#define QCR_REPAIR_ALL 2

/* What an image and its recycler are doing. All sizes are in bytes. Those up to recycler_running describe this
 * moment, those from guest_reads on have only grown since the image was opened.
 */
struct qcr_stats {
    /* sizeof(struct qcr_stats), set by the caller. */
    uint32_t struct_size;
    /* 0. */
    uint32_t reserved;
    /* Size of the virtual disk. */
    uint64_t virtual_size;
    /* Length of the image file. */
    uint64_t file_size;
    /* Clusters that something refers to, metadata included. */
    uint64_t used;
    /* Clusters whose unlinking is not durable yet, or that an older request may still use. */
    uint64_t freed;
    /* Free clusters with arbitrary contents. */
    uint64_t junk;
    /* Free clusters overwritten with zeroes, not flushed yet. */
    uint64_t erased;
    /* Free clusters that are zero after any crash: the pool for new guest writes. */
    uint64_t available;
    /* Clusters allocated and not linked yet, or being erased. */
    uint64_t roots;
    /* Destinations of moves in progress. */
    uint64_t copies;
    /* Clusters being copied. */
    uint64_t moves_copying;
    /* Clusters copied, not flushed. */
    uint64_t moves_copied;
    /* Clusters whose copy is durable. */
    uint64_t moves_flushed;
    /* Clusters whose new reference is not durable yet. */
    uint64_t moves_referenced;
    /* 1 while the recycler runs, 0 while it is stopped or paused. */
    uint64_t recycler_running;
    /* Guest read requests. */
    uint64_t guest_reads;
    /* Bytes the guest read. */
    uint64_t guest_read_bytes;
    /* Guest write requests. */
    uint64_t guest_writes;
    /* Bytes the guest wrote. */
    uint64_t guest_write_bytes;
    /* Guest discard and write-zeroes requests. */
    uint64_t guest_discards;
    /* Bytes the guest discarded or zeroed. */
    uint64_t guest_discard_bytes;
    /* Guest flush requests. */
    uint64_t guest_flushes;
    /* Flushes of the device. */
    uint64_t device_flushes;
    /* Bytes of metadata read from the device. */
    uint64_t metadata_read_bytes;
    /* Bytes of metadata written to the device. */
    uint64_t metadata_write_bytes;
    /* Bytes of clusters whose move was completed. */
    uint64_t moved_bytes;
    /* Moves cancelled by guest writes and discards. */
    uint64_t moves_cancelled;
    /* Bytes erased. */
    uint64_t erased_bytes;
    /* Bytes cut off the end of the file. */
    uint64_t truncated_bytes;
    /* Compactions completed. */
    uint64_t compactions;
    /* Failures in the recycler's work. */
    uint64_t background_errors;
};

/* What an image is. Sizes are in bytes. */
struct qcr_info {
    /* sizeof(struct qcr_info), set by the caller. */
    uint32_t struct_size;
    /* Of the format: 2 or 3. */
    uint32_t version;
    /* Size of the virtual disk. */
    uint64_t virtual_size;
    /* Cluster size. */
    uint64_t cluster_size;
    /* Length of the image file. */
    uint64_t file_size;
    /* Width of a refcount in bits. */
    uint32_t refcount_bits;
    /* QCR_INFO_LAZY_REFCOUNTS, QCR_INFO_READ_ONLY, QCR_INFO_EXTENDED_L2, QCR_INFO_DATA_FILE, QCR_INFO_RAW_DATA_FILE,
     * QCR_INFO_ENCRYPTED.
     */
    uint32_t flags;
    /* How many internal snapshots there are. */
    uint32_t snapshots;
    /* How many things keep parts of the image where they are: see qcr_get_pinned(). */
    uint32_t pinned;
    /* The backing file's name as the image records it, or "". */
    char backing_file[1024];
    /* The backing file's format as the image records it, or "". */
    char backing_format[64];
    /* The external data file's name as the image records it, or "". */
    char data_file[1024];
};

/* Takes one line of UTF-8, valid during the call; called on the thread of the call it was given to, with no lock
 * of the library held. It must return by itself (no longjmp, no C++ exception).
 */
typedef void (*qcr_text_fn)(void *user, const char *text);

/* What a check found. */
struct qcr_check_report {
    /* sizeof(struct qcr_check_report), set by the caller. */
    uint32_t struct_size;
    /* How many findings were put in words; the rest, if there are very many, are only counted. */
    uint32_t messages;
    /* Errors that may lose data: refcounts too low, references outside the file, overlaps, bad entries. */
    uint64_t corruptions;
    /* Clusters counted more often than they are referred to. */
    uint64_t leaks;
    /* Of `corruptions`, how many were repaired. */
    uint64_t corruptions_fixed;
    /* Of `leaks`, how many were repaired. */
    uint64_t leaks_fixed;
    /* Guest clusters that are allocated in the file. */
    uint64_t allocated_clusters;
    /* Guest clusters of the virtual disk. */
    uint64_t total_clusters;
    /* Allocated guest clusters that do not follow their neighbour in the file. */
    uint64_t fragmented_clusters;
    /* End of the last cluster in use, in bytes. */
    uint64_t image_end_offset;
};

/* Fills `stats`.
 *
 * Errors: -EINVAL.
 */
int qcr_get_stats(struct qcr_image *image, struct qcr_stats *stats, struct qcr_error *error);

/* Writes the statistics as Prometheus text, labelled with the image's id, into `buffer` of `size` bytes, as
 * snprintf() does: always closed by a zero byte if `size` is not 0, and cut if it does not fit. `*needed` becomes
 * the text's length without that byte: the text was cut if `*needed >= size`. `buffer` may be NULL if `size` is 0.
 *
 * Errors: -EINVAL.
 */
int qcr_stats_prometheus(struct qcr_image *image, char *buffer, size_t size, size_t *needed,
                         struct qcr_error *error);

/* Fills `info`.
 *
 * Errors: -EINVAL.
 */
int qcr_get_info(struct qcr_image *image, struct qcr_info *info, struct qcr_error *error);

/* Calls `each` with `user` for everything that keeps parts of the image where they are, in words.
 *
 * Errors: -EINVAL.
 */
int qcr_get_pinned(struct qcr_image *image, qcr_text_fn each, void *user, struct qcr_error *error);

/* Checks an open image, while it is in use; repairs nothing. Findings are not errors: they are in `report`, and in
 * words in the calls of `finding` (may be NULL).
 *
 * Errors: -EBADF; the device's.
 */
int qcr_check(struct qcr_image *image, qcr_text_fn finding, void *user, struct qcr_check_report *report,
              struct qcr_error *error);

/* Checks the image in the file `path`, which nobody may be using, and repairs what `repair` allows
 * (QCR_REPAIR_NONE, QCR_REPAIR_LEAKS or QCR_REPAIR_ALL). Findings are not errors: they are in `report`, and in
 * words in the calls of `finding` (may be NULL).
 *
 * Errors: as qcr_open_path().
 */
int qcr_check_path(const char *path, uint32_t repair, qcr_text_fn finding, void *user,
                   struct qcr_check_report *report, struct qcr_error *error);

/* As qcr_check_path(), on block callbacks; then their `destroy` is called.
 *
 * Errors: as qcr_open_callbacks().
 */
int qcr_check_callbacks(const struct qcr_block_callbacks *callbacks, uint32_t repair, qcr_text_fn finding,
                        void *user, struct qcr_check_report *report, struct qcr_error *error);

/* ==============================================================================================================
 * Persistent bitmaps
 *
 * Which parts of the disk were written since somebody last looked: for incremental backups. They live in the image
 * (version 3 of the format only). While an image is open for writing, the file says that they are in use; closing it
 * stores them, and everything done here becomes durable with that. After a crash they are inconsistent, as in QEMU,
 * and can only be removed. The recycler's moves mark nothing. All calls from any thread, and while the image is in use.
 */

/* Flag of a bitmap: it marks what is written. */
#define QCR_BITMAP_RECORDING 1

/* Flag of a bitmap: it was left behind by somebody who did not store it; it can only be removed. */
#define QCR_BITMAP_INCONSISTENT 2

/* What a bitmap is. */
struct qcr_bitmap {
    /* sizeof(struct qcr_bitmap), as the library knows it. */
    uint32_t struct_size;
    /* QCR_BITMAP_RECORDING, QCR_BITMAP_INCONSISTENT. */
    uint32_t flags;
    /* Bytes of the disk that one bit stands for. */
    uint64_t granularity;
    /* Bytes of the disk that are marked, in whole units of the granularity. */
    uint64_t dirty;
    /* Its name, UTF-8. */
    char name[1024];
};

/* Takes a bitmap, valid during the call; called on the thread that called qcr_get_bitmaps(), with no lock of the
 * library held. It must return by itself (no longjmp, no C++ exception).
 */
typedef void (*qcr_bitmap_fn)(void *user, const struct qcr_bitmap *bitmap);

/* A range of the disk. */
struct qcr_range {
    /* sizeof(struct qcr_range), set by the caller. */
    uint32_t struct_size;
    /* 0. */
    uint32_t reserved;
    /* Where it starts, in bytes. */
    uint64_t offset;
    /* Its length in bytes; 0: there is none. */
    uint64_t length;
};

/* Calls `each` with `user` for every bitmap, in the image's order.
 *
 * Errors: -EBADF; on an image that was opened read-only also those of reading the file.
 */
int qcr_get_bitmaps(struct qcr_image *image, qcr_bitmap_fn each, void *user, struct qcr_error *error);

/* Adds an empty bitmap. `granularity`: a power of two from 512 bytes to 2 GiB, 0 for 64 KiB; `flags`: 0 or
 * QCR_BITMAP_RECORDING.
 *
 * Errors: -EINVAL for a name that is taken, empty or longer than 1023 bytes, and for an unusable granularity;
 * -EOPNOTSUPP for an image of version 2, or whose header has no room; -EROFS; -EBADF.
 */
int qcr_add_bitmap(struct qcr_image *image, const char *name, uint64_t granularity, uint32_t flags,
                   struct qcr_error *error);

/* Removes a bitmap, also an inconsistent one.
 *
 * Errors: -EINVAL if there is none of this name; -EROFS; -EBADF.
 */
int qcr_remove_bitmap(struct qcr_image *image, const char *name, struct qcr_error *error);

/* Takes all marks off a bitmap. Waits for the requests that are under way, as qcr_add_bitmap() and qcr_record_bitmap() do: when it
 * returns, what they wrote is there for a backup, and what comes later is marked. So it must not be called on a thread that
 * others' requests need to end.
 *
 * Errors: as qcr_remove_bitmap(); -EINVAL for an inconsistent bitmap.
 */
int qcr_clear_bitmap(struct qcr_image *image, const char *name, struct qcr_error *error);

/* Lets a bitmap mark what is written from now on, now and whenever the image is opened (`recording` not 0), or stop to.
 *
 * Errors: as qcr_clear_bitmap().
 */
int qcr_record_bitmap(struct qcr_image *image, const char *name, int recording, struct qcr_error *error);

/* Marks in the bitmap `target` whatever `source` marks; their granularities may differ.
 *
 * Errors: as qcr_clear_bitmap(), for either.
 */
int qcr_merge_bitmap(struct qcr_image *image, const char *target, const char *source,
                     struct qcr_error *error);

/* Finds the first part of the disk from byte `from` on that a bitmap marks. Start from 0, and go on from the end of what
 * was found, until the length is 0.
 *
 * Errors: as qcr_clear_bitmap().
 */
int qcr_next_dirty(struct qcr_image *image, const char *name, uint64_t from, struct qcr_range *range,
                   struct qcr_error *error);

/* ==============================================================================================================
 * Internal snapshots
 *
 * What the disk was at some moment, inside the image. QEMU reads these snapshots, and this library QEMU's. A change is
 * durable when its call returns; a power cut leaves it done or not done. All calls from any thread, and while the image is
 * in use: reads go on, what changes the disk waits for a part of the call whose length depends on how large the image's
 * tables are, not on the data.
 */

/* An internal snapshot. */
struct qcr_snapshot {
    /* sizeof(struct qcr_snapshot): set by the caller, or as the library knows it where the library calls. */
    uint32_t struct_size;
    /* When it was made, beyond `seconds`, in nanoseconds. */
    uint32_t nanoseconds;
    /* When it was made, in seconds since 1970 (UTC). */
    uint64_t seconds;
    /* How long the guest had been running, in nanoseconds, as far as whoever made it said. */
    uint64_t vm_clock;
    /* Bytes of VM state; 0: there is none. */
    uint64_t vm_state_size;
    /* Size of the virtual disk in bytes when it was made. */
    uint64_t virtual_size;
    /* Its ID, which no other snapshot of the image has, UTF-8. */
    char id[128];
    /* Its name, UTF-8. */
    char name[256];
};

/* Takes a snapshot's description, valid during the call; called on the thread that called qcr_get_snapshots(), with no lock
 * of the library held. It must return by itself (no longjmp, no C++ exception).
 */
typedef void (*qcr_snapshot_fn)(void *user, const struct qcr_snapshot *snapshot);

/* Calls `each` with `user` for every internal snapshot, in the image's order.
 *
 * Errors: -EBADF.
 */
int qcr_get_snapshots(struct qcr_image *image, qcr_snapshot_fn each, void *user, struct qcr_error *error);

/* Makes a snapshot of the disk: of everything written by requests that had ended before this call, flushed or not; what
 * a request under way writes is in it or not. `made` may be NULL.
 *
 * Errors: -EINVAL for a name that is empty, longer than 255 bytes, or the name or ID of a snapshot that there is;
 * -EOPNOTSUPP if the image's refcounts are too narrow for one more reference (those of one bit always), or beyond 65,536
 * snapshots; -EUCLEAN if the image's refcounts are wrong; -EROFS; -EBADF; those of writing. Nothing has changed then.
 */
int qcr_create_snapshot(struct qcr_image *image, const char *name, struct qcr_snapshot *made,
                        struct qcr_error *error);

/* Deletes the snapshot with this ID or, if there is none, this name. What only it used is free then, VM state as well.
 *
 * Errors: -EINVAL if there is no such snapshot, or several have the name; otherwise as qcr_create_snapshot().
 */
int qcr_delete_snapshot(struct qcr_image *image, const char *id_or_name, struct qcr_error *error);

/* Lets the disk be what it was when a snapshot was made, its size included; the snapshot is told as in
 * qcr_delete_snapshot(), and stays. What the disk was until now is lost unless another snapshot has it. Bitmaps that mark
 * what is written mark the whole disk.
 *
 * The guest must not be running: what it remembers of the disk is not so any more. Requests under way end first.
 *
 * Errors: as qcr_delete_snapshot(); -EOPNOTSUPP also if the disk had another size and the image is of version 2.
 */
int qcr_apply_snapshot(struct qcr_image *image, const char *id_or_name, struct qcr_error *error);

/* ==============================================================================================================
 * Images that nobody is using
 *
 * Work on whole files. Nobody may be using them, which their locks see to: -EAGAIN otherwise. Any thread.
 */

/* What a commit into a backing file did. */
struct qcr_commit_report {
    /* sizeof(struct qcr_commit_report), set by the caller. */
    uint32_t struct_size;
    /* 0. */
    uint32_t reserved;
    /* Bytes written to the backing file. */
    uint64_t written;
    /* Bytes made zero in the backing file. */
    uint64_t zeroed;
};

/* Writes what the image in the file `path` holds into its backing file, which grows if it is shorter than the disk,
 * and empties the image: its disk reads as before. No other image may have the same backing file. A power cut at any
 * moment leaves a disk that reads as before.
 *
 * `options` must allow backing files (QCR_BACKING_ALLOW). `report` may be NULL.
 *
 * Errors: as qcr_open_path(); -EINVAL if the image has no backing file or `options` do not allow it; -EAGAIN if
 * somebody uses one of the files; those of reading and writing. The disk reads as before after any of them.
 */
int qcr_commit_path(const char *path, const struct qcr_options *options, struct qcr_commit_report *report,
                    struct qcr_error *error);

/* Makes the image in the file `path` one of version 3 of the format, if it is of version 2. A power cut at any moment
 * leaves one or the other.
 *
 * Errors: as qcr_open_path(); -EOPNOTSUPP if its header has no room for that.
 */
int qcr_upgrade_path(const char *path, struct qcr_error *error);

#ifdef __cplusplus
}
#endif

#endif /* QCOWRECYCLE_H */
