/* An encrypted image of 1 MiB. The arguments are its path and its passphrase. */
#include "harness.h"

#include <stddef.h>

static struct qcr_error error;

/* The options as programs have them that were compiled before there were passphrases. */
#define OLDER_SIZE offsetof(struct qcr_options, passphrase)

int main(int argc, char **argv)
{
    struct qcr_options options;
    struct qcr_info info;
    struct qcr_image *image = NULL;
    unsigned char data[1024], back[4096];
    char passphrase[64];
    size_t i;

    CHECK(argc == 3);
    QCR_INIT(error);
    QCR_INIT(info);
    QCR_INIT(options);
    EXPECT(0, qcr_options_init(&options, &error));
    CHECK(options.passphrase == NULL && options.passphrase_length == 0);
    memset(data, 0x5a, sizeof(data));

    /* Without a passphrase: no contents, in whatever way it is missing. */
    options.struct_size = OLDER_SIZE;
    options.passphrase = "not looked at";
    options.passphrase_length = 99;
    EXPECT(0, qcr_open_path(argv[1], &options, NULL, &image, &error));
    EXPECT(0, qcr_get_info(image, &info, &error));
    CHECK((info.flags & QCR_INFO_ENCRYPTED) != 0 && info.pinned == 2);
    EXPECT(-ENOKEY, qcr_read(image, back, 512, 0, &error));
    EXPECT(-ENOKEY, qcr_write(image, data, 512, 0, &error));
    EXPECT(0, qcr_discard(image, 0, 65536, &error));
    EXPECT(0, qcr_close(image, &error));
    qcr_free(image);
    options.struct_size = sizeof(options);

    options.passphrase = NULL;
    EXPECT(-EINVAL, qcr_open_path(argv[1], &options, NULL, &image, &error));
    options.passphrase = "x";
    options.passphrase_length = UINT64_MAX;
    EXPECT(-EINVAL, qcr_open_path(argv[1], &options, NULL, &image, &error));
    CHECK(strcmp(error.field, "passphrase_length") == 0);
    options.passphrase_length = 1;
    EXPECT(-EKEYREJECTED, qcr_open_path(argv[1], &options, NULL, &image, &error));

    /* The program's copy is its own again when the image is open; a configuration string leaves it alone. */
    CHECK(strlen(argv[2]) < sizeof(passphrase));
    strcpy(passphrase, argv[2]);
    options.passphrase = passphrase;
    options.passphrase_length = strlen(passphrase);
    EXPECT(0, qcr_options_parse(&options, "keep_erased=0", &error));
    CHECK(options.passphrase == passphrase && options.passphrase_length == strlen(argv[2]));
    EXPECT(0, qcr_open_path(argv[1], &options, NULL, &image, &error));
    memset(passphrase, 0, sizeof(passphrase));
    EXPECT(0, qcr_get_info(image, &info, &error));
    CHECK((info.flags & QCR_INFO_ENCRYPTED) != 0 && info.pinned == 1);
    EXPECT(0, qcr_write(image, data, sizeof(data), 512, &error));
    EXPECT(0, qcr_flush(image, &error));
    EXPECT(0, qcr_read(image, back, sizeof(back), 0, &error));
    for (i = 0; i < sizeof(back); i++) {
        CHECK(back[i] == (i >= 512 && i < 1536 ? 0x5a : 0));
    }
    EXPECT(0, qcr_close(image, &error));
    qcr_free(image);

    puts("encrypted: ok");
    return 0;
}
