// Calls a plugin library as TensorRT would: each line of the input is one callback and its
// arguments, each is answered by lines of the output.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

struct Logger : ILogger {
  void log(Severity severity, const char* message) noexcept override {
    std::printf("log %d %s\n", static_cast<int>(severity), message);
  }
} logger;

struct Finder : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

template <class Value>
Value next(std::istream& line) {
  Value value{};
  line >> value;
  return value;
}

template <class Interface>
Interface* capability(IPluginV3& plugin, PluginCapabilityType kind) {
  return static_cast<Interface*>(plugin.getCapabilityInterface(kind));
}

void print(const PluginFieldCollection& fields) {
  for (int32_t i = 0; i < fields.nbFields; i++) {
    const PluginField& field = fields.fields[i];
    uint32_t bits;
    std::memcpy(&bits, field.data, sizeof(bits));
    std::printf("field %s %d %d %08x\n", field.name, static_cast<int>(field.type), field.length,
                bits);
  }
}

// A field as NAME TYPE LENGTH VALUE; every type has room for its length. "none" has no data.
struct Given {
  std::string name, value;
  int type, length;
  std::vector<double> data = std::vector<double>(8, 0.0);

  void store() {
    if (type == static_cast<int>(PluginFieldType::kINT32)) {
      const auto number = static_cast<int32_t>(std::strtol(value.c_str(), nullptr, 10));
      std::memcpy(data.data(), &number, sizeof(number));
    } else {
      const float number = std::strtof(value.c_str(), nullptr);
      std::memcpy(data.data(), &number, sizeof(number));
    }
  }
};

std::unique_ptr<IPluginV3> create(IPluginCreatorV3One& creator, std::istream& line) {
  std::vector<Given> given;
  const auto phase = static_cast<TensorRTPhase>(next<int>(line));
  std::string name;
  while (line >> name) {
    Given one{name, "", next<int>(line), next<int>(line)};
    line >> one.value;
    one.store();
    given.push_back(one);
  }
  std::vector<PluginField> fields;
  for (Given& one : given)
    fields.emplace_back(one.name.c_str(), one.value == "none" ? nullptr : one.data.data(),
                        static_cast<PluginFieldType>(one.type), one.length);
  PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  return std::unique_ptr<IPluginV3>(creator.createPlugin("node", &collection, phase));
}

Dims dims(std::istream& line, int count) {
  Dims found{count, {}};
  for (int i = 0; i < count; i++) found.d[i] = next<int64_t>(line);
  return found;
}

PluginTensorDesc tensor(const Dims& dims, int type, int format = 0) {
  return {dims, static_cast<DataType>(type), static_cast<TensorFormat>(format), -1.0f};
}

void build_call(IPluginV3OneBuild& build, const std::string& verb, std::istream& line) {
  if (verb == "types") {
    const DataType inputs[7] = {static_cast<DataType>(next<int>(line))};
    DataType outputs[2] = {};
    const int status = build.getOutputDataTypes(outputs, 2, inputs, next<int>(line));
    std::printf("types %d %d %d\n", status, static_cast<int>(outputs[0]),
                static_cast<int>(outputs[1]));
  } else if (verb == "shapes") {
    DimsExprs inputs[7] = {}, outputs[2] = {};
    const int axes = next<int>(line);
    for (int i = 0; i < 7; i++) {
      inputs[i].nbDims = axes;
      for (int axis = 0; axis < axes; axis++)
        inputs[i].d[axis] = reinterpret_cast<const IDimensionExpr*>(intptr_t{10} * i + axis + 1);
    }
    auto& builder = reinterpret_cast<IExprBuilder&>(inputs);  // never looked into
    std::printf("shapes %d", build.getOutputShapes(inputs, 7, nullptr, 0, outputs, 2, builder));
    for (const DimsExprs& output : outputs)
      for (int axis = 0; axis < output.nbDims; axis++)
        std::printf(" %zu", reinterpret_cast<size_t>(output.d[axis]));
    std::printf("\n");
  } else if (verb == "format") {
    DynamicPluginTensorDesc tensors[9] = {};
    const int at = next<int>(line);
    for (DynamicPluginTensorDesc& each : tensors) {
      const int type = next<int>(line);
      each.desc = tensor({}, type, next<int>(line));
    }
    std::printf("format %d\n", build.supportsFormatCombination(at, tensors, 7, 2) ? 1 : 0);
  } else if (verb == "configure") {
    DynamicPluginTensorDesc inputs[7] = {}, outputs[2] = {};
    inputs[0].desc = tensor(dims(line, 3), 1);
    std::printf("configure %d\n", build.configurePlugin(inputs, 7, outputs, 2));
  } else if (verb == "workspace") {
    DynamicPluginTensorDesc inputs[7] = {}, outputs[2] = {};
    inputs[1].max = dims(line, 3);
    std::printf("workspace %zu\n", build.getWorkspaceSize(inputs, 7, outputs, 2));
  } else if (verb == "tactics") {
    std::printf("outputs %d tactics %d limit %d cache '%s' metadata %d\n", build.getNbOutputs(),
                build.getNbTactics(), build.getFormatCombinationLimit(), build.getTimingCacheID(),
                build.getMetadataString() != nullptr);
  }
}

// enqueue TYPE OF_WORDS AXES z_v... z_l... WORKSPACE STREAM: tensor i lies at 4096 * (i + 1)
int enqueue(IPluginV3OneRuntime& runtime, std::istream& line) {
  const int type = next<int>(line), of_words = next<int>(line), axes = next<int>(line);
  PluginTensorDesc inputs[7] = {}, outputs[2] = {};
  inputs[0] = tensor(dims(line, axes), type);
  inputs[1] = tensor(dims(line, axes), of_words);
  const auto workspace = next<uintptr_t>(line), stream = next<uintptr_t>(line);
  void* pointers[9];
  for (int i = 0; i < 9; i++) pointers[i] = reinterpret_cast<void*>(uintptr_t{4096} * (i + 1));
  return runtime.enqueue(inputs, outputs, pointers, pointers + 7,
                         reinterpret_cast<void*>(workspace),
                         reinterpret_cast<cudaStream_t>(stream));
}

void call(IPluginCreatorV3One& creator, std::unique_ptr<IPluginV3>& plugin, const std::string& verb,
          std::istream& line) {
  if (verb == "set") {
    const auto name = next<std::string>(line);
    setenv(name.c_str(), next<std::string>(line).c_str(), 1);
  } else if (verb == "creator") {
    std::printf("creator %s %s %s\n", creator.getPluginName(), creator.getPluginVersion(),
                creator.getPluginNamespace());
    print(*creator.getFieldNames());
  } else if (verb == "create") {
    plugin = nullptr;
    plugin = create(creator, line);
    std::printf("created %d\n", plugin != nullptr);
  } else if (verb == "nothing") {
    std::printf("created %d\n", creator.createPlugin("node", nullptr, {}) != nullptr);
  } else if (!plugin) {
    std::printf("no plugin\n");
  } else if (verb == "clone") {
    plugin.reset(plugin->clone());
  } else if (verb == "attach") {
    auto* runtime = capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME);
    std::unique_ptr<IPluginV3> ready(runtime->attachToContext(nullptr));
    std::printf("attached %d\n", ready != nullptr);
    if (ready) plugin = std::move(ready);
  } else if (verb == "core") {
    auto* core = capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE);
    std::printf("core %s %s %s %d\n", core->getPluginName(), core->getPluginVersion(),
                core->getPluginNamespace(),
                plugin->getCapabilityInterface(static_cast<PluginCapabilityType>(9)) == nullptr);
  } else if (verb == "fields") {
    auto* runtime = capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME);
    print(*runtime->getFieldsToSerialize());
  } else if (verb == "enqueue") {
    auto* runtime = capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME);
    std::printf("enqueued %d\n", enqueue(*runtime, line));
  } else {
    build_call(*capability<IPluginV3OneBuild>(*plugin, PluginCapabilityType::kBUILD), verb, line);
  }
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  using SetLoggerFinder = void(ILoggerFinder*);
  using GetCreators = IPluginCreatorInterface* const*(int32_t&);
  reinterpret_cast<SetLoggerFinder*>(dlsym(library, "setLoggerFinder"))(&finder);
  int32_t count = 0;
  auto* creators = reinterpret_cast<GetCreators*>(dlsym(library, "getCreators"))(count);
  if (count != 1) return 1;
  auto& creator = static_cast<IPluginCreatorV3One&>(*creators[0]);
  std::unique_ptr<IPluginV3> plugin;
  for (std::string text; std::getline(std::cin, text);) {
    std::istringstream line(text);
    const auto verb = next<std::string>(line);
    call(creator, plugin, verb, line);
  }
  return 0;
}
