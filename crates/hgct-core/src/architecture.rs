//! What the planner needs to know of any model: layers in model order, with the parameters, the
//! floating-point operations and the activations of each.
//!
//! A [`ModelSpec`] is what hgct can train; an [`Architecture`] is what it can plan, which is more:
//! the families of [`FAMILIES`], read from their Hugging Face `config.json`. Layer 0 is the
//! embedding, the last is the head (final norm, `lm_head`, loss), between them are the blocks.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::dtype::DType;
use crate::model::{LayerKind, ModelSpec};

mod config;
mod families;
#[cfg(test)]
mod tests;

/// The values of `model_type` that are known, and what each is.
pub const FAMILIES: [(&str, &str); 13] = [
    ("llama", "Llama"),
    ("mistral", "Mistral"),
    ("qwen2", "Qwen2"),
    ("qwen3", "Qwen3"),
    ("gpt2", "GPT-2"),
    ("gpt_neo", "GPT-Neo"),
    ("opt", "OPT"),
    ("mixtral", "Mixtral"),
    ("qwen2_moe", "Qwen2 MoE"),
    ("qwen3_moe", "Qwen3 MoE"),
    ("deepseek", "DeepSeekMoE"),
    ("deepseek_v2", "DeepSeek-V2"),
    ("deepseek_v3", "DeepSeek-V3"),
];

/// A model as the planner sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    /// The `model_type` of its configuration.
    pub family: String,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Longest sequence the model was made for.
    pub max_position: u32,
    /// Layers that differ.
    pub classes: Vec<LayerClass>,
    /// Layers in model order: index into `classes`, and how many follow each other.
    pub runs: Vec<(usize, u32)>,
    /// Parameters of the embedding that the head uses too, else 0: two layers hold them, and they
    /// count once.
    pub tied_parameters: u64,
    /// Tensor-parallel degrees must divide these: heads, widths of MLPs.
    pub divisible: Vec<u32>,
}

/// Layers that are alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerClass {
    /// What it is.
    pub kind: LayerKind,
    /// Its name for people.
    pub name: String,
    /// Parameters in matrices that tensor parallelism divides; a tied head's stand in the
    /// embedding alone.
    pub dense_parameters: u64,
    /// Parameters that every rank of a tensor-parallel group holds: norms, biases, routers.
    pub replicated_parameters: u64,
    /// Its routed experts.
    pub experts: Option<Experts>,
    /// Weights that every token is multiplied with, routed experts left out.
    pub multiplied_weights: u64,
    /// Its attention.
    pub attention: Option<Attention>,
    /// Elements a token that backward needs, which tensor parallelism divides.
    pub saved_divided: u64,
    /// Elements a token that backward needs, whole on every rank of a group: inputs of norms and of
    /// the products behind them.
    pub saved_whole: u64,
    /// Elements a token that backward needs in single precision whatever the compute dtype: the
    /// softmax over the vocabulary, router scores. Divided like `saved_divided`.
    pub saved_f32: u64,
}

/// Routed experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// How many.
    pub count: u32,
    /// How many a token is sent to.
    pub per_token: u32,
    /// Parameters of each.
    pub parameters_each: u64,
    /// Elements that one token leaves in one expert for backward.
    pub saved_each: u64,
}

/// Shape of a layer's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Query heads.
    pub heads: u32,
    /// Width over which scores are summed.
    pub score_dim: u32,
    /// Width of a head's values.
    pub value_dim: u32,
    /// Tokens a query looks back at most; none: all.
    pub window: Option<u32>,
}

/// How much of a layer's activations is kept from forward to backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kept {
    /// All that backward needs; attention scores are computed again in blocks, as fused attention
    /// does.
    All,
    /// The layer's input alone: backward computes the rest again.
    Input,
}

impl Architecture {
    /// Reads a Hugging Face `config.json`; `file` is only named in errors. Keys that do not change
    /// sizes are not looked at.
    pub fn from_config_json(file: &str, text: &str) -> Result<Self> {
        config::read(file, text)
    }

    /// The class of each layer in model order.
    pub fn layers(&self) -> impl Iterator<Item = &LayerClass> {
        self.runs.iter().flat_map(|&(class, count)| std::iter::repeat_n(&self.classes[class], count as usize))
    }

    /// Parameters in all; tied ones count once.
    pub fn num_parameters(&self) -> u64 {
        self.runs.iter().map(|&(class, count)| self.classes[class].num_parameters() * u64::from(count)).sum()
    }

    /// Parameters that one token meets: all but the experts it is not sent to.
    pub fn num_active_parameters(&self) -> u64 {
        self.runs
            .iter()
            .map(|&(class, count)| {
                let class = &self.classes[class];
                let idle = class.experts.map_or(0, |e| u64::from(e.count - e.per_token) * e.parameters_each);
                (class.num_parameters() - idle) * u64::from(count)
            })
            .sum()
    }

    /// Model flops of one sample of `seq_len` tokens, forward and backward.
    pub fn train_flops(&self, seq_len: u32) -> f64 {
        self.runs
            .iter()
            .map(|&(class, count)| 3.0 * f64::from(count) * self.classes[class].forward_flops(seq_len))
            .sum()
    }

    /// Bytes of one sample's activation between layers.
    pub fn edge_bytes(&self, seq_len: u32, dtype: DType) -> u64 {
        u64::from(seq_len) * u64::from(self.hidden_size) * dtype.size_bytes()
    }

    /// Whether the model's matrices can be divided among `degree` ranks.
    pub fn allows_tensor_parallel(&self, degree: u32) -> bool {
        degree > 0 && self.divisible.iter().all(|size| size.is_multiple_of(degree))
    }

    /// Whether any layer has routed experts.
    pub fn has_experts(&self) -> bool {
        self.classes.iter().any(|class| class.experts.is_some())
    }
}

impl LayerClass {
    /// Parameters in all.
    pub fn num_parameters(&self) -> u64 {
        self.dense_parameters + self.replicated_parameters + self.num_expert_parameters()
    }

    /// Parameters of its routed experts.
    pub fn num_expert_parameters(&self) -> u64 {
        self.experts.map_or(0, |experts| u64::from(experts.count) * experts.parameters_each)
    }

    /// Parameters that each rank of a group holds, with experts divided among `expert_parallel` ranks
    /// beside.
    pub fn parameters_a_rank(&self, tensor_parallel: u32, expert_parallel: u32) -> u64 {
        let t = u64::from(tensor_parallel.max(1));
        let experts = self.num_expert_parameters().div_ceil(t * u64::from(expert_parallel.max(1)));
        self.dense_parameters.div_ceil(t) + self.replicated_parameters + experts
    }

    /// Floating-point operations that the mathematics of the layer needs for one sample of `seq_len`
    /// tokens, forward: two a multiply-add, attention over what causality (and a window) lets a
    /// query see. Backward needs twice as much. (Narayanan et al. 2021, arXiv 2104.04473, with the
    /// causal half.)
    pub fn forward_flops(&self, seq_len: u32) -> f64 {
        let s = f64::from(seq_len);
        let routed = self.experts.map_or(0, |e| u64::from(e.per_token) * e.parameters_each);
        2.0 * s * (self.multiplied_weights + routed) as f64 + self.attention_flops(seq_len)
    }

    /// The part of [`LayerClass::forward_flops`] that is scores and weighted values.
    pub fn attention_flops(&self, seq_len: u32) -> f64 {
        let Some(attention) = self.attention else { return 0.0 };
        let s = f64::from(seq_len);
        let window = f64::from(attention.window.unwrap_or(seq_len).min(seq_len));
        let seen = window * s - window * window / 2.0;
        2.0 * seen * f64::from(attention.heads) * f64::from(attention.score_dim + attention.value_dim)
    }

    /// Bytes that one sample in flight keeps alive on each rank of a tensor-parallel group.
    ///
    /// Counted tensor by tensor as in Korthikanti et al. 2022 (arXiv 2205.05198), table 2, without
    /// attention scores and dropout masks: their 34 s·b·h for a GPT block becomes 2 B times
    /// (4 h whole + 4 h + 2 f divided).
    pub fn activation_bytes(
        &self,
        seq_len: u32,
        dtype: DType,
        tensor_parallel: u32,
        hidden_size: u32,
        kept: Kept,
    ) -> u64 {
        let (s, e) = (u64::from(seq_len), dtype.size_bytes());
        match kept {
            Kept::Input => s * u64::from(hidden_size) * e,
            Kept::All => {
                let t = u64::from(tensor_parallel.max(1));
                let routed = self.experts.map_or(0, |x| u64::from(x.per_token) * x.saved_each);
                let divided = s * ((self.saved_divided + routed) * e + self.saved_f32 * 4);
                s * self.saved_whole * e + divided.div_ceil(t)
            }
        }
    }
}

impl From<&ModelSpec> for Architecture {
    fn from(model: &ModelSpec) -> Self {
        families::Sizes {
            layers: model.num_layers,
            heads: model.num_heads,
            kv_heads: model.num_kv_heads,
            head_dim: model.head_dim,
            intermediate: model.intermediate_size,
            tied: model.tie_embeddings,
            ..families::Sizes::new("llama", model.hidden_size, model.vocab_size, model.max_position)
        }
        .architecture()
    }
}
