/* A stub of NVIDIA's driver without a GPU; see `test_driver.py`.

   Its functions have the types that cuda.h declares, or this file does not compile.
   Device memory is host memory, work is done when it is queued, and handles work
   between processes (memfds, opened through /proc). Kernels are implemented in C, see
   cubin.c. Like a real driver it refuses copies across two registrations, unknown
   handles, and handles of memory that cannot have any. `stub_hold` keeps events from
   being reached, `stub_break` simulates a sticky failure, and `stub_capture` a stream
   capture in another thread. */

#define _GNU_SOURCE
#include <cuda.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cubin.h"

#define MAX_REGIONS 4096
#define MAX_DEVICES 2

/* Definitions below must agree with the header's declarations. */
#define DECLARE(name) static __typeof__(name) stub_##name

enum kind { FREE = 0, DEVICE, HOST, PINNED, OPENED };

struct region {
    enum kind kind;
    uintptr_t base;
    size_t size;
    int fd;
    int device;
    int is_virtual;
    int is_pooled;
};

struct handle {
    char magic[8];
    int32_t pid;
    int32_t fd;
    uint64_t size;
    char rest[40];
};

struct event {
    volatile int64_t *counters; /* recorded, reached */
    int fd;
    int flags;
    int is_opened;
};

static struct region regions[MAX_REGIONS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local CUcontext current;
static _Thread_local CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
static int is_held, is_broken, is_capturing, next_virtual, next_pooled;
static int num_streams, num_events, num_batches, num_copies;

void stub_hold(int held) { is_held = held; }
void stub_break(int broken) { is_broken = broken; }
void stub_capture(int capturing) { is_capturing = capturing; }
void stub_next_virtual(void) { next_virtual = 1; }
void stub_next_pooled(void) { next_pooled = 1; }
int stub_num_batches(void) { return num_batches; }
int stub_num_copies(void) { return num_copies; }

int stub_num_open(void) {
    int count = num_streams + num_events;
    for (int i = 0; i < MAX_REGIONS; i++) count += regions[i].kind != FREE;
    return count;
}

static int env(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static CUresult ready(void) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    if (is_capturing && mode == CU_STREAM_CAPTURE_MODE_GLOBAL)
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return is_broken ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}

#define READY                                    \
    do {                                         \
        CUresult status_ = ready();              \
        if (status_ != CUDA_SUCCESS) return status_; \
    } while (0)

static struct region *add(enum kind kind, uintptr_t base, size_t size, int fd) {
    struct region *made = NULL;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAX_REGIONS && !made; i++)
        if (regions[i].kind == FREE) made = &regions[i];
    if (made) {
        memset(made, 0, sizeof *made);
        made->kind = kind;
        made->base = base;
        made->size = size;
        made->fd = fd;
        made->device = (int)(intptr_t)current - 1;
    }
    pthread_mutex_unlock(&lock);
    return made;
}

static struct region *find(uintptr_t address, enum kind kind) {
    for (int i = 0; i < MAX_REGIONS; i++) {
        struct region *one = &regions[i];
        if (one->kind != FREE && (kind == FREE || one->kind == kind) &&
            address >= one->base && address < one->base + one->size)
            return one;
    }
    return NULL;
}

static CUresult drop(uintptr_t base, enum kind kind) {
    struct region *one = find(base, kind);
    if (!one || one->base != base) return CUDA_ERROR_INVALID_VALUE;
    if (one->fd >= 0) {
        munmap((void *)one->base, one->size);
        close(one->fd);
    }
    one->kind = FREE;
    return CUDA_SUCCESS;
}

/* -- the device ------------------------------------------------------------------ */

DECLARE(cuInit);
static CUresult stub_cuInit(unsigned int flags) {
    (void)flags;
    return (CUresult)env("STUB_INIT", CUDA_SUCCESS);
}

DECLARE(cuDriverGetVersion);
static CUresult stub_cuDriverGetVersion(int *version) {
    *version = env("STUB_VERSION", 13000);
    return CUDA_SUCCESS;
}

DECLARE(cuDeviceGetCount);
static CUresult stub_cuDeviceGetCount(int *count) {
    *count = env("STUB_DEVICES", MAX_DEVICES);
    return CUDA_SUCCESS;
}

DECLARE(cuDeviceGet);
static CUresult stub_cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

static int real_number(CUdevice device) {
    return env("STUB_REVERSED", 0) ? MAX_DEVICES - 1 - device : device;
}

DECLARE(cuDeviceGetUuid);
static CUresult stub_cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
    memset(uuid->bytes, 0x10 + real_number(device), sizeof uuid->bytes);
    return CUDA_SUCCESS;
}

DECLARE(cuDeviceGetName);
static CUresult stub_cuDeviceGetName(char *name, int length, CUdevice device) {
    snprintf(name, length, "Stub %d", real_number(device));
    return CUDA_SUCCESS;
}

DECLARE(cuDeviceGetAttribute);
static CUresult stub_cuDeviceGetAttribute(int *value, CUdevice_attribute kind,
                                          CUdevice device) {
    (void)device;
    *value = kind == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0;
    return CUDA_SUCCESS;
}

DECLARE(cuDevicePrimaryCtxRetain);
static CUresult stub_cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)(intptr_t)(device + 1);
    return (CUresult)env("STUB_RETAIN", CUDA_SUCCESS);
}

DECLARE(cuThreadExchangeStreamCaptureMode);
static CUresult stub_cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *swapped) {
    CUstreamCaptureMode before = mode;
    mode = *swapped;
    *swapped = before;
    return CUDA_SUCCESS;
}

DECLARE(cuCtxSetCurrent);
static CUresult stub_cuCtxSetCurrent(CUcontext context) {
    current = context;
    return CUDA_SUCCESS;
}

DECLARE(cuCtxGetCurrent);
static CUresult stub_cuCtxGetCurrent(CUcontext *context) {
    *context = current;
    return CUDA_SUCCESS;
}

DECLARE(cuCtxGetStreamPriorityRange);
static CUresult stub_cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    READY;
    *least = 0;
    *greatest = -5;
    return CUDA_SUCCESS;
}

/* -- streams and events ---------------------------------------------------------- */

DECLARE(cuStreamCreateWithPriority);
static CUresult stub_cuStreamCreateWithPriority(CUstream *stream, unsigned int flags,
                                                int priority) {
    READY;
    if (flags != CU_STREAM_NON_BLOCKING || priority > 0 || priority < -5)
        return CUDA_ERROR_INVALID_VALUE;
    int *made = malloc(sizeof *made);
    *made = priority;
    *stream = (CUstream)made;
    num_streams++;
    return CUDA_SUCCESS;
}

DECLARE(cuStreamDestroy);
static CUresult stub_cuStreamDestroy(CUstream stream) {
    READY;
    free(stream);
    num_streams--;
    return CUDA_SUCCESS;
}

static int map_counters(struct event *event) {
    if (ftruncate(event->fd, 4096) != 0) return 0;
    event->counters = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, event->fd, 0);
    return event->counters != MAP_FAILED;
}

DECLARE(cuEventCreate);
static CUresult stub_cuEventCreate(CUevent *made, unsigned int flags) {
    READY;
    if ((flags & CU_EVENT_INTERPROCESS) && !(flags & CU_EVENT_DISABLE_TIMING))
        return CUDA_ERROR_INVALID_VALUE;
    struct event *event = calloc(1, sizeof *event);
    event->fd = memfd_create("stub-event", MFD_CLOEXEC);
    event->flags = (int)flags;
    if (!map_counters(event)) return CUDA_ERROR_OUT_OF_MEMORY;
    *made = (CUevent)event;
    num_events++;
    return CUDA_SUCCESS;
}

DECLARE(cuEventDestroy);
static CUresult stub_cuEventDestroy(CUevent opaque) {
    READY;
    struct event *event = (struct event *)opaque;
    munmap((void *)event->counters, 4096);
    close(event->fd);
    free(event);
    num_events--;
    return CUDA_SUCCESS;
}

DECLARE(cuEventRecord);
static CUresult stub_cuEventRecord(CUevent opaque, CUstream stream) {
    READY;
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    struct event *event = (struct event *)opaque;
    event->counters[0]++;
    if (!is_held) event->counters[1] = event->counters[0];
    return CUDA_SUCCESS;
}

DECLARE(cuEventQuery);
static CUresult stub_cuEventQuery(CUevent opaque) {
    READY;
    struct event *event = (struct event *)opaque;
    if (event->counters[1] < event->counters[0]) return CUDA_ERROR_NOT_READY;
    return CUDA_SUCCESS;
}

DECLARE(cuEventSynchronize);
static CUresult stub_cuEventSynchronize(CUevent opaque) {
    READY;
    struct event *event = (struct event *)opaque;
    while (event->counters[1] < event->counters[0]) usleep(100);
    return CUDA_SUCCESS;
}

DECLARE(cuStreamWaitEvent);
static CUresult stub_cuStreamWaitEvent(CUstream stream, CUevent opaque,
                                       unsigned int flags) {
    READY;
    if (!stream || !opaque || flags) return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}

static void name_it(void *into, int fd, uint64_t size) {
    struct handle *handle = into;
    memset(handle, 0, sizeof *handle);
    memcpy(handle->magic, "\xffstubipc", 8);
    handle->pid = getpid();
    handle->fd = fd;
    handle->size = size;
}

static int open_it(const void *from, uint64_t *size) {
    const struct handle *handle = from;
    char path[64];
    if (memcmp(handle->magic, "\xffstubipc", 8)) return -1;
    if (handle->pid == getpid()) return -2;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle->pid, handle->fd);
    *size = handle->size;
    return open(path, O_RDWR | O_CLOEXEC);
}

DECLARE(cuIpcGetEventHandle);
static CUresult stub_cuIpcGetEventHandle(CUipcEventHandle *handle, CUevent opaque) {
    READY;
    struct event *event = (struct event *)opaque;
    if (!(event->flags & CU_EVENT_INTERPROCESS)) return CUDA_ERROR_INVALID_HANDLE;
    name_it(handle, event->fd, 4096);
    return CUDA_SUCCESS;
}

DECLARE(cuIpcOpenEventHandle);
static CUresult stub_cuIpcOpenEventHandle(CUevent *made, CUipcEventHandle handle) {
    READY;
    uint64_t size;
    int fd = open_it(&handle, &size);
    if (fd < 0) return fd == -2 ? CUDA_ERROR_INVALID_CONTEXT : CUDA_ERROR_MAP_FAILED;
    struct event *event = calloc(1, sizeof *event);
    event->fd = fd;
    event->is_opened = 1;
    if (!map_counters(event)) return CUDA_ERROR_OUT_OF_MEMORY;
    *made = (CUevent)event;
    num_events++;
    return CUDA_SUCCESS;
}

/* -- memory ---------------------------------------------------------------------- */

static CUresult take(enum kind kind, size_t size, uintptr_t *address) {
    if (!size) return CUDA_ERROR_INVALID_VALUE;
    if (size > (1ull << 40)) return CUDA_ERROR_OUT_OF_MEMORY;
    int fd = memfd_create("stub-memory", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, size)) return CUDA_ERROR_OUT_OF_MEMORY;
    void *mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    struct region *made = add(kind, (uintptr_t)mapped, size, fd);
    if (!made) return CUDA_ERROR_OUT_OF_MEMORY;
    if (kind == DEVICE) {
        made->is_virtual = next_virtual;
        made->is_pooled = next_pooled;
        next_virtual = next_pooled = 0;
    }
    *address = made->base;
    return CUDA_SUCCESS;
}

DECLARE(cuMemAlloc);
static CUresult stub_cuMemAlloc(CUdeviceptr *address, size_t size) {
    READY;
    return take(DEVICE, size, (uintptr_t *)address);
}

DECLARE(cuMemFree);
static CUresult stub_cuMemFree(CUdeviceptr address) {
    READY;
    return drop((uintptr_t)address, DEVICE);
}

DECLARE(cuMemHostAlloc);
static CUresult stub_cuMemHostAlloc(void **address, size_t size, unsigned int flags) {
    READY;
    if (flags != CU_MEMHOSTALLOC_PORTABLE) return CUDA_ERROR_INVALID_VALUE;
    return take(HOST, size, (uintptr_t *)address);
}

DECLARE(cuMemFreeHost);
static CUresult stub_cuMemFreeHost(void *address) {
    READY;
    return drop((uintptr_t)address, HOST);
}

DECLARE(cuMemHostRegister);
static CUresult stub_cuMemHostRegister(void *address, size_t size, unsigned int flags) {
    READY;
    if (flags != CU_MEMHOSTREGISTER_PORTABLE) return CUDA_ERROR_INVALID_VALUE;
    if (find((uintptr_t)address, PINNED))
        return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    if (size > (size_t)env("STUB_MAX_PIN", 1 << 30)) return CUDA_ERROR_OUT_OF_MEMORY;
    return add(PINNED, (uintptr_t)address, size, -1) ? CUDA_SUCCESS
                                                     : CUDA_ERROR_OUT_OF_MEMORY;
}

DECLARE(cuMemHostUnregister);
static CUresult stub_cuMemHostUnregister(void *address) {
    READY;
    return drop((uintptr_t)address, PINNED);
}

DECLARE(cuPointerGetAttribute);
static CUresult stub_cuPointerGetAttribute(void *data, CUpointer_attribute kind,
                                           CUdeviceptr address) {
    struct region *one = find((uintptr_t)address, FREE);
    if (!one) return CUDA_ERROR_INVALID_VALUE;
    int is_device = one->kind == DEVICE || one->kind == OPENED;
    switch (kind) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *(unsigned int *)data = is_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        *(int *)data = one->device;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
        *(int *)data = one->kind == DEVICE && !one->is_virtual && !one->is_pooled;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
        *(CUmemoryPool *)data = (CUmemoryPool)(intptr_t)one->is_pooled;
        return CUDA_SUCCESS;
    default:
        return CUDA_ERROR_INVALID_VALUE;
    }
}

DECLARE(cuMemGetAddressRange);
static CUresult stub_cuMemGetAddressRange(CUdeviceptr *base, size_t *size,
                                          CUdeviceptr address) {
    READY;
    struct region *one = find((uintptr_t)address, FREE);
    if (!one) return CUDA_ERROR_NOT_FOUND;
    *base = one->base;
    *size = one->size;
    return CUDA_SUCCESS;
}

DECLARE(cuIpcGetMemHandle);
static CUresult stub_cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
    READY;
    struct region *one = find((uintptr_t)address, DEVICE);
    if (!one || one->base != address || one->is_virtual) return CUDA_ERROR_INVALID_VALUE;
    name_it(handle, one->fd, one->size);
    return CUDA_SUCCESS;
}

DECLARE(cuIpcOpenMemHandle);
static CUresult stub_cuIpcOpenMemHandle(CUdeviceptr *address, CUipcMemHandle handle,
                                        unsigned int flags) {
    READY;
    if (flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) return CUDA_ERROR_INVALID_VALUE;
    uint64_t size;
    int fd = open_it(&handle, &size);
    if (fd == -2) return CUDA_ERROR_INVALID_CONTEXT;
    if (fd < 0) return CUDA_ERROR_INVALID_VALUE;
    void *mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED || !add(OPENED, (uintptr_t)mapped, size, fd))
        return CUDA_ERROR_MAP_FAILED;
    *address = (CUdeviceptr)mapped;
    return CUDA_SUCCESS;
}

DECLARE(cuIpcCloseMemHandle);
static CUresult stub_cuIpcCloseMemHandle(CUdeviceptr address) {
    READY;
    return drop((uintptr_t)address, OPENED);
}

/* -- work ------------------------------------------------------------------------ */

static int crosses(uintptr_t address, size_t size) {
    struct region *pinned = find(address, PINNED);
    return pinned && address + size > pinned->base + pinned->size;
}

static CUresult copy(CUdeviceptr to, CUdeviceptr from, size_t size) {
    if (!size || crosses(to, size) || crosses(from, size))
        return CUDA_ERROR_INVALID_VALUE;
    memmove((void *)to, (void *)from, size);
    num_copies++;
    return CUDA_SUCCESS;
}

DECLARE(cuMemcpyAsync);
static CUresult stub_cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size,
                                   CUstream stream) {
    READY;
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    return copy(to, from, size);
}

static CUresult batch(CUdeviceptr *to, CUdeviceptr *from, size_t *sizes, size_t count,
                      CUmemcpyAttributes *attributes, size_t *firsts, size_t num,
                      CUstream stream) {
    READY;
    if (!stream || num != 1 || firsts[0] != 0 || !count) return CUDA_ERROR_INVALID_VALUE;
    if (attributes->srcAccessOrder != CU_MEMCPY_SRC_ACCESS_ORDER_STREAM ||
        attributes->flags != 0)
        return CUDA_ERROR_INVALID_VALUE;
    num_batches++;
    for (size_t i = 0; i < count; i++) {
        CUresult status = copy(to[i], from[i], sizes[i]);
        if (status != CUDA_SUCCESS) return status;
    }
    return CUDA_SUCCESS;
}

#if CUDA_VERSION >= 13000
static __typeof__(cuMemcpyBatchAsync) batch; /* the signature of this header */
#endif

/* The signature of CUDA 12.8, with the index of the copy that failed. */
static CUresult batch_12(CUdeviceptr *to, CUdeviceptr *from, size_t *sizes,
                         size_t count, CUmemcpyAttributes *attributes, size_t *firsts,
                         size_t num, size_t *failed, CUstream stream) {
    if (failed) *failed = SIZE_MAX;
    return batch(to, from, sizes, count, attributes, firsts, num, stream);
}

DECLARE(cuModuleLoadData);
static CUresult stub_cuModuleLoadData(CUmodule *module, const void *image) {
    READY;
    if (memcmp(image, "\177ELF", 4) || env("STUB_REFUSES_KERNELS", 0))
        return CUDA_ERROR_INVALID_IMAGE;
    *module = (CUmodule)image;
    return CUDA_SUCCESS;
}

DECLARE(cuModuleGetFunction);
static CUresult stub_cuModuleGetFunction(CUfunction *function, CUmodule module,
                                         const char *name) {
    READY;
    *function = (CUfunction)program_of(module, name);
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

DECLARE(cuFuncSetAttribute);
static CUresult stub_cuFuncSetAttribute(CUfunction function, CUfunction_attribute kind,
                                        int value) {
    READY;
    (void)function;
    int is_shared = kind == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    return is_shared && value > 48 << 10 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

DECLARE(cuLaunchKernel);
static CUresult stub_cuLaunchKernel(CUfunction function, unsigned int grid_x,
                                    unsigned int grid_y, unsigned int grid_z,
                                    unsigned int block_x, unsigned int block_y,
                                    unsigned int block_z, unsigned int shared,
                                    CUstream stream, void **parameters, void **extra) {
    READY;
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (extra || shared > 48 << 10 || !grid_x || grid_y * grid_z != 1 ||
        block_x % 32 || block_x > 1024 || block_y * block_z != 1)
        return CUDA_ERROR_INVALID_VALUE;
    const struct program *program = (const struct program *)function;
    return program_run(program, parameters) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* -- errors and function lookup -------------------------------------------------- */

DECLARE(cuGetErrorName);
static CUresult stub_cuGetErrorName(CUresult status, const char **text) {
    static _Thread_local char name[32];
    snprintf(name, sizeof name, "CUDA_ERROR_%d", (int)status);
    *text = name;
    return CUDA_SUCCESS;
}

DECLARE(cuGetErrorString);
static CUresult stub_cuGetErrorString(CUresult status, const char **text) {
    (void)status;
    *text = "the stub says so";
    return CUDA_SUCCESS;
}

#define GIVE(name) {#name, (void *)stub_##name}

static const struct {
    const char *name;
    void *function;
} functions[] = {
    GIVE(cuInit), GIVE(cuDriverGetVersion), GIVE(cuDeviceGetCount), GIVE(cuDeviceGet),
    GIVE(cuDeviceGetUuid), GIVE(cuDeviceGetName), GIVE(cuDeviceGetAttribute),
    GIVE(cuThreadExchangeStreamCaptureMode), GIVE(cuDevicePrimaryCtxRetain),
    GIVE(cuCtxSetCurrent), GIVE(cuCtxGetCurrent),
    GIVE(cuCtxGetStreamPriorityRange), GIVE(cuStreamCreateWithPriority),
    GIVE(cuStreamDestroy), GIVE(cuEventCreate), GIVE(cuEventDestroy),
    GIVE(cuEventRecord), GIVE(cuEventQuery), GIVE(cuEventSynchronize),
    GIVE(cuStreamWaitEvent), GIVE(cuIpcGetEventHandle), GIVE(cuIpcOpenEventHandle),
    GIVE(cuMemAlloc), GIVE(cuMemFree), GIVE(cuMemHostAlloc), GIVE(cuMemFreeHost),
    GIVE(cuMemHostRegister), GIVE(cuMemHostUnregister), GIVE(cuPointerGetAttribute),
    GIVE(cuMemGetAddressRange), GIVE(cuIpcGetMemHandle), GIVE(cuIpcOpenMemHandle),
    GIVE(cuIpcCloseMemHandle), GIVE(cuMemcpyAsync), GIVE(cuModuleLoadData),
    GIVE(cuModuleGetFunction), GIVE(cuFuncSetAttribute), GIVE(cuLaunchKernel),
    GIVE(cuGetErrorName), GIVE(cuGetErrorString),
};

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version,
                             cuuint64_t flags, CUdriverProcAddressQueryResult *result) {
    (void)flags;
    int driver = env("STUB_VERSION", 13000);
    *function = NULL;
    if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
    if (!strcmp(symbol, "cuGetProcAddress")) *function = (void *)cuGetProcAddress_v2;
    if (!strcmp(symbol, "cuMemcpyBatchAsync") && version <= driver) {
        if (version >= 13000) *function = (void *)batch;
        else if (version >= 12080) *function = (void *)batch_12;
    }
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        if (!strcmp(symbol, functions[i].name)) *function = functions[i].function;
    if (*function) return CUDA_SUCCESS;
    if (result) *result = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return CUDA_ERROR_NOT_FOUND;
}
