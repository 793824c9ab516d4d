// The kernels on a GPU, for plugin.cpp alone: what geometry.py, arguments.py, driver.py and
// launch.py do, on the tables and names of the generated plugin_constants.h. Errors are exceptions
// here.
#pragma once
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>

#include "plugin_constants.h"

// The compiled kernels, as they ship with the Python package.
#define RT_RIS_EMBED(name, file, cuda, capability) \
  __asm__(                                         \
      ".section .rodata\n"                         \
      ".balign 64\n"                               \
      ".local " #name "\n" #name                   \
      ":\n"                                        \
      ".incbin \"" file                            \
      "\"\n"                                       \
      ".previous\n");                              \
  extern "C" const unsigned char name[] __attribute__((visibility("hidden")));
RT_RIS_CODES(RT_RIS_EMBED)
#undef RT_RIS_EMBED

namespace rt_ris {
namespace {

[[noreturn]] void refuse(const std::string& problem) {
  throw std::runtime_error(std::string(NAME) + ": " + problem);
}

bool has_kernels(int64_t channels) {
  return std::count(std::begin(CHANNELS), std::end(CHANNELS), channels) > 0;
}

std::string channels_accepted() {
  std::string text;
  for (const int channels : CHANNELS)
    text += (text.empty() ? "C=" : " and C=") + std::to_string(channels);
  return text;
}

// ----------------------------------------------------------------------------------- geometry

struct Sizes {
  int64_t expressions, pixels, words, channels;
  bool half, shared;  // one z_v for all expressions
};

struct Launch {
  const char* kernel;
  unsigned grid_x, grid_y, threads, shared_bytes;
};

struct Geometry {
  Launch forward, reduce;
  int splits, tiles;
};

void check(const Sizes& s) {
  if (!has_kernels(s.channels))
    refuse("got C=" + std::to_string(s.channels) + " channels; kernels are compiled for " +
           channels_accepted() + ". Build without the plugin, and TensorRT inlines the operator.");
  if (s.words < 1 || s.words > MAX_WORDS)
    refuse("got L=" + std::to_string(s.words) + " words; the kernels take 1 to " +
           std::to_string(MAX_WORDS) + ". Cut the sentences, or build without the plugin.");
  if (s.expressions < 1 || s.expressions > MAX_EXPRESSIONS)
    refuse("got N=" + std::to_string(s.expressions) + " expressions; the kernels take 1 to " +
           std::to_string(MAX_EXPRESSIONS) + ". Pass them in several calls.");
  if (s.pixels < 1 || s.pixels > MAX_ELEMENTS / s.channels)
    refuse("got P=" + std::to_string(s.pixels) + " pixels of C=" + std::to_string(s.channels) +
           " channels; the kernels take at least one pixel, and P * C up to " +
           std::to_string(MAX_ELEMENTS) + ".");
}

// How geometry.py launches these sizes on a GPU with so many multiprocessors.
Geometry geometry(const Sizes& s, int multiprocessors) {
  check(s);
  const ForwardPlan* forward = std::begin(FORWARD_PLANS);
  while (forward->half != s.half || forward->channels != s.channels || forward->words < s.words)
    if (++forward == std::end(FORWARD_PLANS)) refuse("has no forward kernel for these sizes.");
  const int expressions = static_cast<int>(s.expressions);
  const int tiles = static_cast<int>((s.pixels + TILE_PIXELS - 1) / TILE_PIXELS);
  const int blocks = std::min(MAX_BLOCKS, multiprocessors * forward->blocks_per_multiprocessor);
  const int splits = std::max(1, std::min(tiles, blocks / expressions));
  const ReducePlan* reduce = std::begin(REDUCE_PLANS);
  while (reduce->half != s.half || reduce->channels != s.channels || reduce->splits < splits)
    if (++reduce == std::end(REDUCE_PLANS)) refuse("has no reduction for these sizes.");
  const auto y = static_cast<unsigned>(expressions);
  const int forward_bytes =
      splits == tiles ? forward->one_tile_shared_bytes : forward->shared_bytes;
  return {{forward->kernel, static_cast<unsigned>(splits), y,
           static_cast<unsigned>(forward->threads), static_cast<unsigned>(forward_bytes)},
          {reduce->kernel, static_cast<unsigned>(s.words), y,
           static_cast<unsigned>(reduce->threads), static_cast<unsigned>(reduce->shared_bytes)},
          splits,
          tiles};
}

// ---------------------------------------------------------------------------------- arguments

struct Attributes {
#define RT_RIS_MEMBER(type, name, value) type name = value;
  RT_RIS_ATTRIBUTES(RT_RIS_MEMBER)
#undef RT_RIS_MEMBER
};

// As numpy does it in logit() of the operator: in double, with infinities at 0 and 1.
float logit(float probability) {
  const double p = probability;
  return static_cast<float>(std::log(p) - std::log1p(-p));
}

// As fill() of arguments.py.
Arguments fill(const Sizes& s, const Geometry& plan, const Attributes& attributes,
               const void* const* inputs, void* const* outputs, void* workspace) {
  const int64_t sums = s.expressions * plan.splits * s.words * s.channels;
  Arguments a{};
  a.z_v = inputs[0];
  a.z_l = inputs[1];
  a.word_mask = inputs[2];
  a.gamma_v = inputs[3];
  a.beta_v = inputs[4];
  a.gamma_l = inputs[5];
  a.beta_l = inputs[6];
  a.f_lav = outputs[0];
  a.f_val = outputs[1];
  a.sums = workspace;
  a.masses = static_cast<const float*>(workspace) + sums;
  a.z_v_step = s.shared ? 0 : s.pixels * s.channels;
  a.pixels = static_cast<int>(s.pixels);
  a.words = static_cast<int>(s.words);
  a.splits = plan.splits;
  a.tiles_per_block = plan.tiles / plan.splits;
  a.longer_blocks = plan.tiles % plan.splits;
  a.threshold = logit(attributes.threshold);
  a.scale = attributes.scale;
  a.epsilon = attributes.epsilon;
  a.normalize = attributes.normalize;
  return a;
}

// ------------------------------------------------------------------------------------- driver

// cuda.h gives some functions another name (cuCtxPushCurrent is cuCtxPushCurrent_v2); macros expand
// it, so that the type, the symbol and the calls are of the same version.
#define RT_RIS_TEXT_(name) #name
#define RT_RIS_TEXT(name) RT_RIS_TEXT_(name)
#define RT_RIS_DRIVER(ONE)      \
  ONE(cuInit)                   \
  ONE(cuGetErrorName)           \
  ONE(cuCtxGetDevice)           \
  ONE(cuCtxPushCurrent)         \
  ONE(cuCtxPopCurrent)          \
  ONE(cuDriverGetVersion)       \
  ONE(cuDeviceGetAttribute)     \
  ONE(cuDevicePrimaryCtxRetain) \
  ONE(cuLibraryLoadData)        \
  ONE(cuLibraryUnload)          \
  ONE(cuLibraryGetKernel)       \
  ONE(cuKernelSetAttribute)     \
  ONE(cuLaunchKernelEx)

// The functions of the CUDA driver, found at run time.
struct Driver {
#define RT_RIS_MEMBER(name) decltype(&::name) name = nullptr;
  RT_RIS_DRIVER(RT_RIS_MEMBER)
#undef RT_RIS_MEMBER

  static const Driver& get() {
    static const Driver driver;  // where this throws, the next call tries again
    return driver;
  }

  void check(CUresult status, const char* what) const {
    if (status == CUDA_SUCCESS) return;
    const char* name = nullptr;
    cuGetErrorName(status, &name);
    refuse(std::string("CUDA refused ") + what + ": " +
           (name ? name : std::to_string(status).c_str()) + ".");
  }

 private:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
      refuse("found no CUDA driver: " + std::string(dlerror()) + ". Install an NVIDIA driver.");
#define RT_RIS_FIND(name) find(library, RT_RIS_TEXT(name), this->name);
    RT_RIS_DRIVER(RT_RIS_FIND)
#undef RT_RIS_FIND
    check(cuInit(0), "cuInit");
  }

  template <class Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function)
      refuse(std::string("the CUDA driver has no ") + name + "; one of CUDA 12 or later has.");
  }
};

// Makes a device's primary context current; the caller's is current again afterwards.
class OnDevice {
 public:
  OnDevice(const Driver& cuda, CUcontext context) : cuda_(cuda) {
    cuda_.check(cuda_.cuCtxPushCurrent(context), "cuCtxPushCurrent");
  }
  ~OnDevice() {
    CUcontext popped;
    cuda_.cuCtxPopCurrent(&popped);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  const Driver& cuda_;
};

// The compiled kernels on one GPU, shared by all plugins there and by their threads.
class Kernels {
 public:
  // Those of the calling thread's device, or of device 0 where it has no context.
  static std::shared_ptr<Kernels> of_current_device() {
    const Driver& cuda = Driver::get();
    CUdevice device = 0;
    if (cuda.cuCtxGetDevice(&device) != CUDA_SUCCESS) device = 0;
    static std::mutex mutex;
    static std::map<CUdevice, std::weak_ptr<Kernels>> known;
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Kernels> kernels = known[device].lock();
    if (!kernels) known[device] = kernels = std::make_shared<Kernels>(cuda, device);
    return kernels;
  }

  Kernels(const Driver& cuda, CUdevice device) : cuda_(cuda), device_(device) {
    capability_ = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                  attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    if (capability_ < LEAST_CAPABILITY)
      refuse("GPU " + std::to_string(device) + " has compute capability " + version(capability_) +
             "; the kernels need " + version(LEAST_CAPABILITY) +
             " or later. Build without the plugin, and TensorRT inlines the operator.");
    multiprocessors_ = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    cuda_.check(cuda_.cuDevicePrimaryCtxRetain(&context_, device), "cuDevicePrimaryCtxRetain");
    const OnDevice on_device(cuda_, context_);
    cuda_.check(
        cuda_.cuLibraryLoadData(&library_, code(), nullptr, nullptr, 0, nullptr, nullptr, 0),
        "cuLibraryLoadData");
  }
  // The primary context stays retained: TensorRT and the program live in it.
  ~Kernels() { cuda_.cuLibraryUnload(library_); }
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

  int multiprocessors() const { return multiprocessors_; }

  // `dependent`: may start while the kernel before it on the stream ends, where the GPU can.
  void launch(const Launch& launch, Arguments& arguments, CUstream stream, bool dependent) {
    CUlaunchAttribute overlap{};
    overlap.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    overlap.value.programmaticStreamSerializationAllowed = 1;
    CUlaunchConfig config{};
    config.gridDimX = launch.grid_x;
    config.gridDimY = launch.grid_y;
    config.gridDimZ = 1;
    config.blockDimX = launch.threads;
    config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = launch.shared_bytes;
    config.hStream = stream;
    config.attrs = &overlap;
    config.numAttrs = dependent && capability_ >= PROGRAMMATIC_LAUNCH ? 1 : 0;
    void* parameters[] = {&arguments};
    const auto function = reinterpret_cast<CUfunction>(kernel(launch));
    cuda_.check(cuda_.cuLaunchKernelEx(&config, function, parameters, nullptr), launch.kernel);
  }

 private:
  struct Found {
    CUkernel kernel = nullptr;
    unsigned shared_bytes = 0;
  };

  static std::string version(int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  }

  // What the driver loads for this GPU.
  const unsigned char* code() const {
    int cuda = 0;
    cuda_.check(cuda_.cuDriverGetVersion(&cuda), "cuDriverGetVersion");
#define RT_RIS_TRY(name, file, least, only) \
  if (cuda >= least && (only == 0 || only == capability_)) return name;
    RT_RIS_CODES(RT_RIS_TRY)
#undef RT_RIS_TRY
    refuse("has no code for compute capability " + version(capability_) + " and a driver of CUDA " +
           std::to_string(cuda / 1000) + "." + std::to_string(cuda % 1000 / 10) +
           ". Update the driver, or build without the plugin.");
  }

  int attribute(CUdevice_attribute which) const {
    int value = 0;
    cuda_.check(cuda_.cuDeviceGetAttribute(&value, which, device_), "cuDeviceGetAttribute");
    return value;
  }

  // A kernel that may use so much shared memory.
  CUkernel kernel(const Launch& launch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Found& found = found_[launch.kernel];
    if (!found.kernel)
      cuda_.check(cuda_.cuLibraryGetKernel(&found.kernel, library_, launch.kernel), launch.kernel);
    if (found.shared_bytes < launch.shared_bytes) {
      const OnDevice on_device(cuda_, context_);
      cuda_.check(
          cuda_.cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                     static_cast<int>(launch.shared_bytes), found.kernel, device_),
          launch.kernel);
      found.shared_bytes = launch.shared_bytes;
    }
    return found.kernel;
  }

  const Driver& cuda_;
  const CUdevice device_;
  int capability_ = 0;
  int multiprocessors_ = 0;
  CUcontext context_ = nullptr;
  CUlibrary library_ = nullptr;
  std::mutex mutex_;
  std::map<std::string_view, Found> found_;
};

}  // namespace
}  // namespace rt_ris
