/* Kernels for the stub of the driver; see cubin.c. */

#include <stddef.h>

struct program;

/* Find one of our kernels in a cubin for Hopper; NULL if there is none. */
const struct program *program_of(const void *cubin, const char *name);

/* Run a launch, given each parameter's address; 0 if the parameters do not fit. */
int program_run(const struct program *program, void **parameters);
