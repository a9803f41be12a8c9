/* The kernels of `triton_kernels.py`, implemented on the host.

   The code in a cubin cannot run here. Like a driver, this file reads the kernel's name
   and the number and sizes of its parameters from the cubin. A launch that packs other
   parameters reads wrong values, as on a GPU. */

#include "cubin.h"

#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EM_CUDA_ 190
#define EIFMT_SVAL 4
#define EIATTR_KPARAM_INFO 0x17
#define MAX_PARAMETERS 32
#define NUM_SCRATCH 2

typedef void run(const int64_t *argument, const char *name);

static const struct kernel {
    const char *name;
    int num_longs, num_ints;
    run *run;
} kernels[];

struct program {
    const struct kernel *kernel;
    char name[64];
    int num_parameters;
    int sizes[MAX_PARAMETERS];
};

/* -- contents of a cubin ---------------------------------------------------------- */

static const Elf64_Shdr *section(const char *cubin, const char *name) {
    const Elf64_Ehdr *head = (const void *)cubin;
    const Elf64_Shdr *all = (const void *)(cubin + head->e_shoff);
    const char *names = cubin + all[head->e_shstrndx].sh_offset;
    for (int i = 0; i < head->e_shnum; i++)
        if (!strcmp(names + all[i].sh_name, name)) return &all[i];
    return NULL;
}

static void read_sizes(struct program *program, const char *at, const char *end) {
    while (at < end) {
        uint8_t format = at[0], attribute = at[1];
        uint16_t bytes;
        memcpy(&bytes, at + 2, sizeof bytes);
        at += 4;
        if (format != EIFMT_SVAL) continue;
        if (attribute == EIATTR_KPARAM_INFO) {
            uint16_t number;
            uint32_t packed;
            memcpy(&number, at + 4, sizeof number);
            memcpy(&packed, at + 8, sizeof packed);
            if (number < MAX_PARAMETERS) program->sizes[number] = packed >> 18;
            program->num_parameters++;
        }
        at += bytes;
    }
}

static const struct kernel *kernel_of(const char *name) {
    for (const struct kernel *one = kernels; one->name; one++)
        if (!strncmp(name, one->name, strlen(one->name))) return one;
    return NULL;
}

const struct program *program_of(const void *image, const char *name) {
    const Elf64_Ehdr *head = image;
    char wanted[96];
    if (memcmp(head->e_ident, ELFMAG, SELFMAG) || head->e_machine != EM_CUDA_)
        return NULL;
    snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
    const Elf64_Shdr *info = section(image, wanted);
    const struct kernel *kernel = kernel_of(name);
    if (!info || !kernel) return NULL;
    struct program *made = calloc(1, sizeof *made);
    made->kernel = kernel;
    snprintf(made->name, sizeof made->name, "%s", name);
    const char *at = (const char *)image + info->sh_offset;
    read_sizes(made, at, at + info->sh_size);
    return made;
}

/* -- launches -------------------------------------------------------------------- */

int program_run(const struct program *program, void **parameters) {
    const struct kernel *kernel = program->kernel;
    int64_t arguments[MAX_PARAMETERS];
    int known = kernel->num_longs + kernel->num_ints;
    if (program->num_parameters != known + NUM_SCRATCH) return 0;
    for (int i = 0; i < program->num_parameters; i++) {
        int wanted = i < kernel->num_longs || i >= known ? 8 : 4;
        if (program->sizes[i] != wanted || !parameters[i]) return 0;
        if (wanted == 8) memcpy(&arguments[i], parameters[i], 8);
        else arguments[i] = *(const int32_t *)parameters[i];
        if (i >= known && arguments[i]) return 0;
    }
    kernel->run(arguments, program->name);
    return 1;
}

/* -- the kernels; arguments are in the order of `kernel_launches.py` ----------------------- */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

static void upload(const int64_t *a, const char *name) {
    (void)name;
    memcpy((void *)a[0], (void *)a[1], 8 * a[2]);
}

static void copy_rows(const int64_t *a, const char *name) {
    const int64_t *planes = (void *)a[0], *ranges = (void *)a[1];
    const int32_t *blocks = (void *)a[2];
    int64_t staging = a[3], skip = a[4], length = a[5], plane_bytes = a[6];
    int64_t block_stride = a[7], row_stride = a[8], row_bytes = a[9];
    int64_t first = a[10], end = a[11], num_planes = a[12];
    int64_t num_blocks = a[13], block_rows = a[14];
    int is_gather = strstr(name, "gather") != NULL;
    for (int64_t number = first; number < end; number++) {
        int64_t part = number / num_planes, plane = number % num_planes;
        for (int64_t row = 0; row < num_blocks * block_rows; row++) {
            int64_t block = blocks[part * num_blocks + row / block_rows];
            if (block < 0) continue;
            int64_t begins = row * row_bytes;
            int64_t staged = (number - first) * plane_bytes - skip;
            int64_t low = greatest(greatest(begins, ranges[2 * part]), -staged);
            int64_t high = least(begins + row_bytes, ranges[2 * part + 1]);
            high = least(high, length - staged);
            if (low >= high) continue;
            char *there = (char *)staging + staged + low;
            char *here = (char *)planes[plane] + block * block_stride;
            here += row % block_rows * row_stride + low - begins;
            if (is_gather) memcpy(there, here, high - low);
            else memcpy(here, there, high - low);
        }
    }
}

static double number_at(const char *at, const char *name) {
    if (strstr(name, "bfloat16")) {
        uint32_t bits = (uint32_t) * (const uint16_t *)at << 16;
        float wide;
        memcpy(&wide, &bits, 4);
        return wide;
    }
    return strstr(name, "float16") ? (double)*(const _Float16 *)at
                                   : (double)*(const float *)at;
}

static void put_number(char *at, double value, const char *name) {
    float single = (float)value;
    if (strstr(name, "bfloat16")) {
        uint32_t bits;
        memcpy(&bits, &single, 4);
        *(uint16_t *)at = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    } else if (strstr(name, "float16")) {
        *(_Float16 *)at = (_Float16)single;
    } else {
        *(float *)at = single;
    }
}

static void rotate_keys(const int64_t *a, const char *name) {
    const int64_t *planes = (void *)a[0];
    const double *factors = (void *)a[1];
    int64_t block_stride = a[2], slot_stride = a[3], first_block = a[4];
    int64_t num_units = (a[5] - first_block) * a[7], block_slots = a[7];
    int64_t num_heads = a[8], head_dim = a[9], first_dim = a[10], num_pairs = a[11];
    int64_t item = strstr(name, "float32") ? 4 : 2;
    int is_interleaved = strstr(name, "pairs") != NULL;
    for (int64_t number = 0; number < a[6] * num_units * num_heads; number++) {
        int64_t unit = number / num_heads % num_units;
        char *key = (char *)planes[number / num_heads / num_units];
        key += (first_block + unit / block_slots) * block_stride;
        key += unit % block_slots * slot_stride + number % num_heads * head_dim * item;
        for (int64_t pair = 0; pair < num_pairs; pair++) {
            char *real = key + (first_dim + (is_interleaved ? 2 * pair : pair)) * item;
            char *imaginary = real + (is_interleaved ? 1 : num_pairs) * item;
            double x = number_at(real, name), y = number_at(imaginary, name);
            double cos = factors[2 * pair], sin = factors[2 * pair + 1];
            put_number(real, x * cos - y * sin, name);
            put_number(imaginary, x * sin + y * cos, name);
        }
    }
}

static const struct kernel kernels[] = {
    {"kvcore_upload", 2, 1, upload},
    {"kvcore_gather", 10, 5, copy_rows},
    {"kvcore_scatter", 10, 5, copy_rows},
    {"kvcore_rotate", 4, 8, rotate_keys},
    {NULL, 0, 0, NULL},
};
