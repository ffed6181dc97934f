#include "bind/bind.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "snapstone's native engine; use it through snapstone._native.";
  snapstone::bind::register_errors(module);
  snapstone::bind::bind_engine(module);
  snapstone::bind::bind_store(module);
  snapstone::bind::bind_save(module);
  snapstone::bind::bind_load(module);
  snapstone::bind::bind_state(module);
  snapstone::bind::bind_cuda(module);
  snapstone::bind::bind_repair(module);
}
