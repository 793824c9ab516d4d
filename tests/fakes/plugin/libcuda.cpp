// Stands for the CUDA driver under a plugin: prints what it is asked for, computes nothing.
//
// FAKE_CUDA_DEVICE           the current context's device; "none" for a thread without a context
// FAKE_CUDA_CAPABILITY       of every device, times ten
// FAKE_CUDA_VERSION          of the driver; 13000 where it is not given
// FAKE_CUDA_MULTIPROCESSORS  of every device
// FAKE_CUDA_REFUSES          a function that fails
// FAKE_CUDA_CODE             a file; code that is loaded is compared with it
#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

std::vector<intptr_t> contexts;  // each is its device + 1

std::string given(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

CUresult answer(const char* function) {
  return given("FAKE_CUDA_REFUSES") == function ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

long current() { return contexts.empty() ? -1 : static_cast<long>(contexts.back()) - 1; }

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return answer("cuInit"); }

CUresult cuGetErrorName(CUresult status, const char** name) {
  *name = status == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : nullptr;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  if (given("FAKE_CUDA_DEVICE") == "none") return CUDA_ERROR_INVALID_CONTEXT;
  *device = std::atoi(given("FAKE_CUDA_DEVICE").c_str());
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  contexts.push_back(reinterpret_cast<intptr_t>(context));
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  *context = reinterpret_cast<CUcontext>(contexts.back());
  contexts.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  const std::string cuda = given("FAKE_CUDA_VERSION");
  *version = cuda.empty() ? 13000 : std::atoi(cuda.c_str());
  return answer("cuDriverGetVersion");
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  const int capability = std::atoi(given("FAKE_CUDA_CAPABILITY").c_str());
  if (which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
    *value = capability / 10;
  else if (which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    *value = capability % 10;
  else if (which == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
    *value = std::atoi(given("FAKE_CUDA_MULTIPROCESSORS").c_str());
  else
    return CUDA_ERROR_INVALID_VALUE;
  return answer("cuDeviceGetAttribute");
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = reinterpret_cast<CUcontext>(static_cast<intptr_t>(device) + 1);
  return answer("cuDevicePrimaryCtxRetain");
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned,
                           CUlibraryOption*, void**, unsigned) {
  std::ifstream file(given("FAKE_CUDA_CODE"), std::ios::binary);
  const std::string wanted((std::istreambuf_iterator<char>(file)), {});
  const bool same = !wanted.empty() && std::memcmp(code, wanted.data(), wanted.size()) == 0;
  std::printf("load %s on %ld\n", same ? "the shipped code" : "something else", current());
  *library = reinterpret_cast<CUlibrary>(1);
  return answer("cuLibraryLoadData");
}

CUresult cuLibraryUnload(CUlibrary) {
  std::printf("unload\n");
  return CUDA_SUCCESS;
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary, const char* name) {
  *kernel = reinterpret_cast<CUkernel>(strdup(name));
  return answer("cuLibraryGetKernel");
}

CUresult cuKernelSetAttribute(CUfunction_attribute which, int value, CUkernel kernel,
                              CUdevice device) {
  std::printf("attribute %d of %s is %d on %d with %ld current\n", static_cast<int>(which),
              reinterpret_cast<const char*>(kernel), value, device, current());
  return answer("cuKernelSetAttribute");
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  bool dependent = false;
  for (unsigned i = 0; i < config->numAttrs; i++)
    dependent = dependent ||
                (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION &&
                 config->attrs[i].value.programmaticStreamSerializationAllowed);
  std::printf("launch %s %u %u %u %u %u %u %u %zu %d ", reinterpret_cast<const char*>(function),
              config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
              config->blockDimY, config->blockDimZ, config->sharedMemBytes,
              reinterpret_cast<size_t>(config->hStream), dependent ? 1 : 0);
  const auto* bytes = static_cast<const unsigned char*>(parameters[0]);
  for (int i = 0; i < ARGUMENT_BYTES; i++) std::printf("%02x", bytes[i]);
  std::printf("%s\n", extra ? " extra" : "");
  return answer("cuLaunchKernelEx");
}
}
