/* What the stub of a driver runs of kernels; see cubin.c. */

#include <stddef.h>

struct program;

/* Find a kernel of ours in a cubin for Hopper; NULL where there is none. */
const struct program *program_of(const void *cubin, const char *name);

/* Run one launch to its end: an address for each parameter. 0: it is no such launch. */
int program_run(const struct program *program, void **parameters);
