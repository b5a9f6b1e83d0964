/* Opens the image that is its argument and prints what came of it: result, code, offset, field, message. */
#include "harness.h"

int main(int argc, char **argv)
{
    struct qcr_image *image = NULL;
    struct qcr_error error;
    int result;
    CHECK(argc == 2);
    QCR_INIT(error);
    result = qcr_open_path(argv[1], NULL, NULL, &image, &error);
    CHECK((result == 0) == (image != NULL));
    printf("%d\n%d\n%" PRId64 "\n%s\n%s\n", result, error.code, error.offset, error.field, error.message);
    qcr_free(image);
    return 0;
}
