// Every operator of the library: schemas, and the CPU kernels behind them. moa_ops/ops.py adds fakes and autograd.
//
//   topk_routing            gate weights, ids and the counting sort, from logits [T, E]
//   linear_routing          the same with logits = x W_r^T, which it returns too
//   sort_by_expert          the sort alone, from ids [T, k] or [T]
//   segment_lora            y = base + bias + sum of the slots' adapters, and with a weight + x W^T; h [T * k, r] is A_e x,
//                           in sorted order
//   routed_lora             linear_routing and segment_lora of the same x, which is read once where that pays: y, what
//                           linear_routing gives, h
//   segment_linear          segment_lora without h, for a layer without gradients; x and base [..., n]
//   routed_linear           the same with its own router: linear_routing first
//   segment_lora_backward   all gradients; with router_weight and logits also the router's (score_func: 0 softmax,
//                           1 sigmoid), with a weight that of x W^T with respect to x. What is not needed comes back
//                           empty.
//   own_linear              whether x W^T is a kernel of our own, faster there than the library's GEMM; on the CPU alone
#include "torch/ops.h"

#include "isa/table.h"

namespace moa {

static std::string cpu_isa() { return kernels().name; }

static std::string cpu_isas() {
  std::string all;
  for (const KernelTable* const* t = kCompiledTables; *t != nullptr; ++t)
    if (cpu_can_run((*t)->name)) all += (all.empty() ? "" : ",") + std::string((*t)->name);
  return all;
}

static void choose_cpu_isa(std::string name) {
  STD_TORCH_CHECK(set_cpu_isa(name.c_str()), "instruction set '", name,
                  "' is not compiled in or not on this machine; allowed are ", cpu_isas());
}

}  // namespace moa

STABLE_TORCH_LIBRARY(moa_ops, m) {
  m.def(
      "topk_routing(Tensor logits, int top_k, int score_func, bool norm_topk_prob, Tensor? selection_bias, "
      "Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "topk_routing_backward(Tensor grad_weights, Tensor logits, Tensor indices, int score_func, "
      "bool norm_topk_prob) -> Tensor");
  m.def("sort_by_expert(Tensor indices, int num_experts) -> (Tensor, Tensor)");
  m.def(
      "linear_routing(Tensor x, Tensor router_weight, int top_k, int score_func, bool norm_topk_prob, "
      "Tensor? selection_bias, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "segment_lora(Tensor x, Tensor lora_A, Tensor lora_B, Tensor weights, Tensor expert_offsets, Tensor order, "
      "Tensor? expert_scaling, float scaling, Tensor? ranks, Tensor? base, Tensor? bias, Tensor? weight=None) "
      "-> (Tensor, Tensor)");
  m.def(
      "routed_lora(Tensor x, Tensor lora_A, Tensor lora_B, Tensor router_weight, int top_k, int score_func, "
      "bool norm_topk_prob, float scaling, Tensor? bias, Tensor? weight=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "segment_lora_backward(Tensor grad_y, Tensor x, Tensor lora_A, Tensor lora_B, Tensor weights, Tensor indices, "
      "Tensor expert_offsets, Tensor order, Tensor h, Tensor? expert_scaling, float scaling, Tensor? ranks, "
      "Tensor? router_weight, Tensor? logits, int score_func, bool norm_topk_prob, bool need_x, bool need_A, "
      "bool need_B, bool need_weights, bool need_router, Tensor? weight=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "segment_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor lora_A, Tensor lora_B, "
      "Tensor weights, Tensor expert_offsets, Tensor order, Tensor? expert_scaling, float scaling, Tensor? ranks) "
      "-> Tensor");
  m.def(
      "routed_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor router_weight, "
      "int top_k, int score_func, bool norm_topk_prob, float scaling) -> Tensor");
  m.def("own_linear(Tensor x, Tensor weight) -> bool");
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
  m.def("set_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(moa_ops, CPU, m) {
  m.impl("topk_routing", TORCH_BOX(&moa::topk_routing_cpu));
  m.impl("topk_routing_backward", TORCH_BOX(&moa::topk_routing_backward_cpu));
  m.impl("sort_by_expert", TORCH_BOX(&moa::sort_by_expert_cpu));
  m.impl("linear_routing", TORCH_BOX(&moa::linear_routing_cpu));
  m.impl("segment_lora", TORCH_BOX(&moa::segment_lora_cpu));
  m.impl("routed_lora", TORCH_BOX(&moa::routed_lora_cpu));
  m.impl("segment_linear", TORCH_BOX(&moa::segment_linear_cpu));
  m.impl("routed_linear", TORCH_BOX(&moa::routed_linear_cpu));
  m.impl("segment_lora_backward", TORCH_BOX(&moa::segment_lora_backward_cpu));
  m.impl("own_linear", TORCH_BOX(&moa::own_linear_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(moa_ops, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&moa::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&moa::cpu_isas));
  m.impl("set_cpu_isa", TORCH_BOX(&moa::choose_cpu_isa));
}
