// Masked mutual attention as a TensorRT plugin in C++: the same plans as plugin.py, the same
// launches as launch.py. plugin_library.py compiles it against the user's TensorRT headers and
// writes plugin_constants.h, which holds what Python decides: the operator's name and attributes,
// the kernels' parameter, and the tables of launches.
//
// Nothing of TensorRT is linked, and the CUDA driver is opened when an engine is about to run, so
// that engines can be built on a machine without a GPU. No exception leaves a callback: it is told
// to TensorRT's logger, and the callback returns an error.
#include <NvInferRuntime.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <exception>
#include <utility>

#include "plugin_kernels.h"

namespace rt_ris {
namespace {

using nvinfer1::DataType;

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

void report(const char* problem) noexcept {
  nvinfer1::ILoggerFinder* finder = logger_finder;
  nvinfer1::ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger)
    logger->log(nvinfer1::ILogger::Severity::kERROR, problem);
  else
    std::fprintf(stderr, "%s\n", problem);
}

// What `body` returns, or `failed` where it throws.
template <class Result, class Body>
Result guarded(Result failed, Body body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    report(error.what());
  } catch (...) {
    report("rt_ris: an unknown error.");
  }
  return failed;
}

// ------------------------------------------------------------------------------------- fields

constexpr nvinfer1::PluginFieldType field_type(const float&) {
  return nvinfer1::PluginFieldType::kFLOAT32;
}

constexpr nvinfer1::PluginFieldType field_type(const int32_t&) {
  return nvinfer1::PluginFieldType::kINT32;
}

// An attribute's value from a field of its name; other fields leave it as it is.
template <class Number>
void read(const nvinfer1::PluginField& field, const char* name, Number& value) {
  if (std::strcmp(field.name, name) != 0) return;
  if (field.type != field_type(value) || field.length != 1 || !field.data)
    refuse(std::string("got field '") + name + "' of PluginFieldType " +
           std::to_string(static_cast<int>(field.type)) + " and length " +
           std::to_string(field.length) + "; it takes type " +
           std::to_string(static_cast<int>(field_type(value))) + " and length 1.");
  std::memcpy(&value, field.data, sizeof(value));
}

Attributes read_fields(const nvinfer1::PluginFieldCollection* given) {
  Attributes attributes;
  if (!given || given->nbFields < 0 || (given->nbFields > 0 && !given->fields))
    refuse("got no fields.");
  for (int32_t i = 0; i < given->nbFields; i++) {
    const nvinfer1::PluginField& field = given->fields[i];
    if (!field.name) refuse("got a field without a name.");
#define RT_RIS_READ(type, name, value) read(field, #name, attributes.name);
    RT_RIS_ATTRIBUTES(RT_RIS_READ)
#undef RT_RIS_READ
  }
  return attributes;
}

// Attributes as TensorRT's fields, which point into this object.
class Fields {
 public:
  explicit Fields(const Attributes& attributes) : attributes_(attributes) {}
  Fields(const Fields&) = delete;
  Fields& operator=(const Fields&) = delete;

  const Attributes& attributes() const { return attributes_; }
  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  const Attributes attributes_;
#define RT_RIS_FIELD(type, name, value) \
  nvinfer1::PluginField(#name, &attributes_.name, field_type(attributes_.name), 1),
  const nvinfer1::PluginField members_[RT_RIS_ATTRIBUTE_COUNT] = {RT_RIS_ATTRIBUTES(RT_RIS_FIELD)};
#undef RT_RIS_FIELD
  const nvinfer1::PluginFieldCollection collection_{RT_RIS_ATTRIBUTE_COUNT, members_};
};

// ------------------------------------------------------------------------------------- plugin

Sizes sizes_of(const nvinfer1::PluginTensorDesc& z_v, const nvinfer1::PluginTensorDesc& z_l) {
  if (z_v.dims.nbDims != 3 || z_l.dims.nbDims != 3)
    refuse("got z_v with " + std::to_string(z_v.dims.nbDims) + " axes and z_l with " +
           std::to_string(z_l.dims.nbDims) + "; both have three: [N or 1, P, C] and [N, L, C].");
  if ((z_v.type != DataType::kHALF && z_v.type != DataType::kFLOAT) || z_l.type != z_v.type)
    refuse("got z_v and z_l as types " + std::to_string(static_cast<int>(z_v.type)) + " and " +
           std::to_string(static_cast<int>(z_l.type)) + "; both are float16, or both float32.");
  if ((z_v.dims.d[0] != 1 && z_v.dims.d[0] != z_l.dims.d[0]) || z_v.dims.d[2] != z_l.dims.d[2])
    refuse(
        "got z_v and z_l of sizes that contradict each other; they are [N or 1, P, C] and [N, "
        "L, C].");
  return {
      z_l.dims.d[0],     z_v.dims.d[1], z_l.dims.d[1], z_l.dims.d[2], z_v.type == DataType::kHALF,
      z_v.dims.d[0] == 1};
}

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const Attributes& attributes, std::shared_ptr<Kernels> kernels)
      : fields_(attributes), kernels_(std::move(kernels)) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType kind) noexcept override {
    switch (kind) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    return guarded<nvinfer1::IPluginV3*>(
        nullptr, [&] { return new Plugin(fields_.attributes(), kernels_); });
  }

  const char* getPluginName() const noexcept override { return NAME; }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }

  int32_t getNbOutputs() const noexcept override { return OUTPUTS; }

  int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                             int32_t input_count) const noexcept override {
    return guarded<int32_t>(1, [&] {
      check_counts(input_count, output_count);
      std::fill_n(outputs, output_count, inputs[0]);
      return 0;
    });
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                          const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                          int32_t output_count, nvinfer1::IExprBuilder&) noexcept override {
    return guarded<int32_t>(1, [&] {
      check_counts(input_count, output_count);
      const nvinfer1::DimsExprs &z_v = inputs[0], &z_l = inputs[1];
      if (z_v.nbDims != 3 || z_l.nbDims != 3)
        refuse("takes z_v and z_l with three axes: [N or 1, P, C] and [N, L, C].");
      outputs[0] = z_v;
      outputs[0].d[0] = z_l.d[0];
      outputs[1] = z_l;
      return 0;
    });
  }

  bool supportsFormatCombination(int32_t at, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t, int32_t) noexcept override {
    const nvinfer1::PluginTensorDesc& tensor = tensors[at].desc;
    return tensor.format == nvinfer1::TensorFormat::kLINEAR &&
           (tensor.type == DataType::kHALF || tensor.type == DataType::kFLOAT) &&
           tensor.type == tensors[0].desc.type;
  }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t output_count) noexcept override {
    return guarded<int32_t>(1, [&] {
      check_counts(input_count, output_count);
      const nvinfer1::Dims& z_v = inputs[0].desc.dims;
      if (z_v.nbDims != 3 || !has_kernels(z_v.d[2]))
        refuse("has kernels for " + channels_accepted() +
               ", not for C=" + (z_v.nbDims == 3 ? std::to_string(z_v.d[2]) : "?") +
               "; build without the plugin, and TensorRT inlines the operator.");
      return 0;
    });
  }

  // Enough on any GPU for any pixel count, as workspace_bound() of geometry.py.
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                          const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    const nvinfer1::Dims& z_l = inputs[1].max;
    const int64_t partials = std::max<int64_t>(z_l.d[0], MAX_BLOCKS);
    return static_cast<size_t>(partials * z_l.d[1] * (z_l.d[2] + 1)) * sizeof(float);
  }

  const char* getTimingCacheID() noexcept override { return ""; }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc*, int32_t,
                        const nvinfer1::PluginTensorDesc*, int32_t) noexcept override {
    return 0;  // sizes are read at each call
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return guarded<nvinfer1::IPluginV3*>(
        nullptr, [&] { return new Plugin(fields_.attributes(), opened()); });
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    return guarded<int32_t>(1, [&] {
      const Sizes sizes = sizes_of(input_descs[0], input_descs[1]);
      check(sizes);
      kernels_ = opened();
      const Geometry plan = geometry(sizes, kernels_->multiprocessors());
      Arguments arguments = fill(sizes, plan, fields_.attributes(), inputs, outputs, workspace);
      kernels_->launch(plan.forward, arguments, stream, false);
      kernels_->launch(plan.reduce, arguments, stream, true);
      return 0;
    });
  }

  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return fields_.collection();
  }

 private:
  static void check_counts(int32_t inputs, int32_t outputs) {
    if (inputs != INPUTS || outputs != OUTPUTS)
      refuse("got " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
             " outputs; it has " + std::to_string(INPUTS) + " and " + std::to_string(OUTPUTS) +
             ".");
  }

  std::shared_ptr<Kernels> opened() const {
    return kernels_ ? kernels_ : Kernels::of_current_device();
  }

  const Fields fields_;
  std::shared_ptr<Kernels> kernels_;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return NAME; }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
    return fields_.collection();
  }

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase) noexcept override {
    return guarded<nvinfer1::IPluginV3*>(nullptr,
                                         [&] { return new Plugin(read_fields(given), nullptr); });
  }

 private:
  const Fields fields_{Attributes()};
};

}  // namespace
}  // namespace rt_ris

// What IPluginRegistry::loadLibrary and `trtexec --dynamicPlugins` look for.
#define RT_RIS_EXPORTED extern "C" __attribute__((visibility("default")))

RT_RIS_EXPORTED void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  rt_ris::logger_finder = finder;
}

RT_RIS_EXPORTED nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static rt_ris::Creator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}
