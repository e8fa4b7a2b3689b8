/* A libcuda.so.1 for Triton's own launcher on a machine without a GPU: it loads and runs nothing, and counts launches. */
#include <stdint.h>
#include <string.h>

static int (*on_launch)(uint64_t function, const void *config, void **params);
static uint64_t launches, functions;

void stub_on_launch(int (*callback)(uint64_t, const void *, void **)) { on_launch = callback; }
uint64_t stub_launches(void) { return launches; }

int cuLaunchKernelEx(const void *config, void *function, void **params, void **extra) {
  ++launches;
  return on_launch ? on_launch((uint64_t)function, config, params) : 0;
}

/* A map holds what it was made from, so that equal maps have equal bytes. */
typedef struct {
  uint64_t address, sizes[5], strides[4];
  uint32_t box[5], steps[5];
  uint8_t type, rank, interleave, swizzle, promotion, fill;
} map_t;

int cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address, const uint64_t *sizes, const uint64_t *strides,
                           const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
  map_t made;
  memset(&made, 0, sizeof made);
  made.address = (uint64_t)address;
  memcpy(made.sizes, sizes, rank * sizeof *sizes);
  memcpy(made.strides, strides, (rank - 1) * sizeof *strides);
  memcpy(made.box, box, rank * sizeof *box);
  memcpy(made.steps, steps, rank * sizeof *steps);
  made.type = type, made.rank = rank, made.interleave = interleave;
  made.swizzle = swizzle, made.promotion = promotion, made.fill = fill;
  memcpy(map, &made, 128);
  return 0;
}
_Static_assert(sizeof(map_t) == 128, "the size of a CUtensorMap");

/* CU_DEVICE_ATTRIBUTE_*: what Triton checks a kernel against, as on an H100. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 97 || attribute == 81 ? 232448 /* shared memory of a block, of a multiprocessor */ : 1;
  return 0;
}
/* CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK is 0; no registers, no spills. */
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "from the stub of libcuda"; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuModuleGetFunction(uint64_t *function, void *module, const char *name) { *function = ++functions; return 0; }
int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) { *value = pointer; return 0; }

/* Never asked for a value here: a real GPU has them. */
#define UNUSED(name) int name(void) { return 0; }
UNUSED(cuInit) UNUSED(cuDeviceGet) UNUSED(cuModuleLoadData) UNUSED(cuModuleUnload) UNUSED(cuDevicePrimaryCtxRetain)
UNUSED(cuCtxSetCurrent) UNUSED(cuCtxGetDevice) UNUSED(cuCtxGetLimit) UNUSED(cuCtxSetLimit) UNUSED(cuFuncSetAttribute)
UNUSED(cuFuncSetCacheConfig) UNUSED(cuStreamIsCapturing) UNUSED(cuOccupancyMaxActiveClusters) UNUSED(cuTensorMapEncodeIm2col)
