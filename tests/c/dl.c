/* Loaded, used with its threads running, unloaded, several times over. The arguments are the library and an image. */
#include "harness.h"

#include <dlfcn.h>

/* ISO C has no conversion from an object's address to a function's, POSIX demands one. */
#define LOOK_UP(function, name)                                    \
    do {                                                           \
        void *address_ = dlsym(library, name);                     \
        CHECK(address_ != NULL);                                   \
        memcpy(&(function), &address_, sizeof(address_));          \
    } while (0)

int main(int argc, char **argv)
{
    int round;
    CHECK(argc == 3);
    for (round = 0; round < 5; round++) {
        void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        const char *(*version)(void);
        int (*open_path)(const char *, const struct qcr_options *, const struct qcr_log *, struct qcr_image **,
                         struct qcr_error *);
        int (*start)(struct qcr_image *, struct qcr_error *);
        int (*close_image)(struct qcr_image *, struct qcr_error *);
        void (*free_image)(struct qcr_image *);
        struct qcr_image *image = NULL;
        struct qcr_error error;

        if (library == NULL) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        QCR_INIT(error);
        LOOK_UP(version, "qcr_version_string");
        LOOK_UP(open_path, "qcr_open_path");
        LOOK_UP(start, "qcr_start");
        LOOK_UP(close_image, "qcr_close");
        LOOK_UP(free_image, "qcr_free");
        CHECK(strcmp(version(), "") != 0);
        EXPECT(0, open_path(argv[2], NULL, NULL, &image, &error));
        EXPECT(0, start(image, &error));
        EXPECT(0, close_image(image, &error));
        free_image(image);
        CHECK(dlclose(library) == 0);
    }
    return 0;
}
