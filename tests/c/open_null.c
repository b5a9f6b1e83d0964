/* On an open image: NULL and impossible memory is refused by name, and what is optional may be NULL. */
#include "harness.h"

static struct qcr_error error;

#define REFUSED(name, call)                      \
    do {                                         \
        EXPECT(-EINVAL, call);                   \
        CHECK(strcmp(error.field, name) == 0);   \
    } while (0)

int main(void)
{
    struct memory memory;
    struct qcr_image *image;
    struct iovec iov[2];
    char buffer[512], cut[16];
    size_t needed = 0, again = 0;
    char *text;

    QCR_INIT(error);
    memory_init(&memory);
    memory_create(&memory, 4 * MIB);
    image = memory_open(&memory);

    REFUSED("iov", qcr_readv(image, NULL, 1, 0, &error));
    REFUSED("iovcnt", qcr_readv(image, iov, -1, 0, &error));
    iov[0].iov_base = NULL;
    iov[0].iov_len = 512;
    REFUSED("iov_base", qcr_writev(image, iov, 1, 0, &error));
    iov[0].iov_base = buffer;
    iov[0].iov_len = SIZE_MAX - 511;
    iov[1].iov_base = buffer;
    iov[1].iov_len = 1024;
    REFUSED("iov_len", qcr_writev(image, iov, 2, 0, &error));
    REFUSED("iov_len", qcr_writev(image, iov, 1, 0, &error));
    REFUSED("buffer", qcr_read(image, NULL, 512, 0, &error));
    REFUSED("buffer", qcr_write(image, NULL, 512, 0, &error));
    REFUSED("count", qcr_write(image, buffer, SIZE_MAX, 0, &error));
    REFUSED("flags", qcr_write_zeroes(image, 0, 512, 2, &error));
    REFUSED("flags", qcr_resize(image, 8 * MIB, 2, &error));
    REFUSED("extent", qcr_get_extent(image, 0, 512, NULL, &error));
    REFUSED("stats", qcr_get_stats(image, NULL, &error));
    REFUSED("info", qcr_get_info(image, NULL, &error));
    REFUSED("report", qcr_check(image, NULL, NULL, NULL, &error));
    REFUSED("each", qcr_get_pinned(image, NULL, NULL, &error));
    REFUSED("needed", qcr_stats_prometheus(image, cut, sizeof(cut), NULL, &error));
    REFUSED("buffer", qcr_stats_prometheus(image, NULL, 1, &needed, &error));

    /* Requests that do not fit say where. */
    EXPECT(-EINVAL, qcr_read(image, buffer, 512, 4 * MIB, &error));
    CHECK(error.offset == (int64_t)(4 * MIB));
    EXPECT(-EINVAL, qcr_read(image, buffer, 512, UINT64_MAX - 511, &error));
    CHECK(error.offset == INT64_MAX);
    EXPECT(-EINVAL, qcr_write(image, buffer, 511, 512, &error));
    CHECK(error.offset == 512);

    /* Nothing to move is no error. */
    EXPECT(0, qcr_readv(image, NULL, 0, 0, &error));
    EXPECT(0, qcr_write(image, NULL, 0, 0, &error));
    EXPECT(0, qcr_compact(image, NULL, NULL, NULL, &error));

    /* As snprintf: the length first, cut text second, all of it third. */
    EXPECT(0, qcr_stats_prometheus(image, NULL, 0, &needed, &error));
    CHECK(needed > 1000);
    memset(cut, 'x', sizeof(cut));
    EXPECT(0, qcr_stats_prometheus(image, cut, sizeof(cut), &again, &error));
    CHECK(again >= sizeof(cut) && strlen(cut) == sizeof(cut) - 1 && memcmp(cut, "# HELP ", 7) == 0);
    text = (char *)malloc(needed + 100);
    CHECK(text != NULL);
    EXPECT(0, qcr_stats_prometheus(image, text, needed + 100, &again, &error));
    CHECK(strlen(text) == again && strstr(text, "qcowrecycle_virtual_size{id=\"\"} 4194304\n") != NULL);
    free(text);

    EXPECT(0, qcr_close(image, &error));
    EXPECT(0, qcr_close(image, &error));
    EXPECT(-EBADF, qcr_read(image, buffer, 512, 0, &error));
    EXPECT(-EBADF, qcr_write(image, buffer, 512, 0, &error));
    EXPECT(-EBADF, qcr_flush(image, &error));
    EXPECT(-EBADF, qcr_start(image, &error));
    CHECK(memory.destroyed == 0);
    qcr_free(image);
    CHECK(memory.destroyed == 1);
    memory_free(&memory);
    return 0;
}
