//! The layers of each family from its sizes: parameters as `transformers` counts them.

use super::{Architecture, Attention, Experts, LayerClass};
use crate::model::LayerKind;

/// Everything that the sizes of a known family follow from.
#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools, reason = "each is a key of the configuration of some family")]
pub(super) struct Sizes {
    pub(super) family: String,
    pub(super) hidden: u32,
    pub(super) vocab: u32,
    pub(super) max_position: u32,
    /// Width of the embedding where it is another than the stream's (OPT).
    pub(super) embedding: u32,
    /// Rows of a learnt position embedding.
    pub(super) positions: u32,
    pub(super) layers: u32,
    pub(super) heads: u32,
    pub(super) kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) intermediate: u32,
    pub(super) tied: bool,
    /// MLP with a gate: three matrices instead of two.
    pub(super) gated: bool,
    /// Parameters of a norm per width: 1 for RMS, 2 with a bias.
    pub(super) norm: u32,
    pub(super) final_norm: bool,
    /// Biases of the projections to queries, keys and values.
    pub(super) qkv_bias: bool,
    /// Bias of the projection behind attention.
    pub(super) out_bias: bool,
    pub(super) mlp_bias: bool,
    /// Norms over each head's queries and keys (Qwen3).
    pub(super) head_norms: bool,
    pub(super) window: Option<u32>,
    pub(super) latent: Option<Latent>,
    pub(super) experts: Option<Routing>,
}

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
#[derive(Debug, Clone)]
pub(super) struct Latent {
    /// Rank of the queries' compression; none: not compressed.
    pub(super) q_rank: Option<u32>,
    pub(super) kv_rank: u32,
    pub(super) nope_dim: u32,
    pub(super) rope_dim: u32,
    pub(super) value_dim: u32,
}

/// Which layers have routed experts, and their sizes.
#[derive(Debug, Clone)]
pub(super) struct Routing {
    pub(super) count: u32,
    pub(super) per_token: u32,
    pub(super) intermediate: u32,
    /// Width of the expert that every token meets; 0: none.
    pub(super) shared: u32,
    /// The shared expert's output has a gate of its own (Qwen2 MoE).
    pub(super) shared_gate: bool,
    /// The router adds a learnt bias an expert (DeepSeek-V3).
    pub(super) router_bias: bool,
    /// Whether each block routes.
    pub(super) sparse: Vec<bool>,
}

impl Sizes {
    /// A Llama-like family: RMS norms, a gated MLP, no biases, one key-value head a head.
    pub(super) fn new(family: &str, hidden: u32, vocab: u32, max_position: u32) -> Self {
        Self {
            family: family.into(),
            hidden,
            vocab,
            max_position,
            embedding: hidden,
            positions: 0,
            layers: 0,
            heads: 1,
            kv_heads: 1,
            head_dim: hidden,
            intermediate: 0,
            tied: false,
            gated: true,
            norm: 1,
            final_norm: true,
            qkv_bias: false,
            out_bias: false,
            mlp_bias: false,
            head_norms: false,
            window: None,
            latent: None,
            experts: None,
        }
    }

    pub(super) fn architecture(&self) -> Architecture {
        let mut classes = vec![self.embedding_class()];
        let mut runs = vec![(0, 1)];
        let sparse = |block: u32| {
            self.experts.as_ref().is_some_and(|e| e.sparse.get(block as usize).copied().unwrap_or(false))
        };
        let mut known: [Option<usize>; 2] = [None, None];
        for block in 0..self.layers {
            let routed = sparse(block);
            let class = *known[usize::from(routed)].get_or_insert_with(|| {
                classes.push(self.block_class(routed));
                classes.len() - 1
            });
            match runs.last_mut() {
                Some((last, count)) if *last == class => *count += 1,
                _ => runs.push((class, 1)),
            }
        }
        classes.push(self.head_class());
        runs.push((classes.len() - 1, 1));
        let mut divisible = vec![self.heads];
        if self.intermediate > 0 && known[0].is_some() {
            divisible.push(self.intermediate);
        }
        divisible.extend(self.experts.as_ref().filter(|_| known[1].is_some()).map(|e| e.intermediate));
        Architecture {
            family: self.family.clone(),
            hidden_size: self.hidden,
            max_position: self.max_position,
            classes,
            runs,
            tied_parameters: if self.tied { wide(self.vocab) * wide(self.embedding) } else { 0 },
            divisible,
        }
    }

    fn embedding_class(&self) -> LayerClass {
        let (h, w) = (wide(self.hidden), wide(self.embedding));
        let projection = if w == h { 0 } else { w * h };
        LayerClass {
            kind: LayerKind::Embedding,
            name: "embedding".into(),
            dense_parameters: wide(self.vocab) * w + projection,
            replicated_parameters: wide(self.positions) * h,
            experts: None,
            multiplied_weights: projection,
            attention: None,
            saved_divided: 0,
            saved_whole: if projection > 0 { w } else { 0 },
            saved_f32: 0,
        }
    }

    fn head_class(&self) -> LayerClass {
        let (h, v, w) = (wide(self.hidden), wide(self.vocab), wide(self.embedding));
        let projection = if w == h { 0 } else { w * h };
        let matrix = v * w;
        LayerClass {
            kind: LayerKind::Head,
            name: "head".into(),
            dense_parameters: if self.tied { projection } else { matrix + projection },
            replicated_parameters: if self.final_norm { h * wide(self.norm) } else { 0 },
            experts: None,
            multiplied_weights: matrix + projection,
            attention: None,
            // Logits, and the softmax over them in single precision.
            saved_divided: v,
            saved_whole: if projection > 0 { 2 * h + w } else { 2 * h },
            saved_f32: v,
        }
    }

    fn block_class(&self, routed: bool) -> LayerClass {
        let h = wide(self.hidden);
        let mut class = LayerClass {
            kind: LayerKind::Block,
            name: if routed { "block with experts" } else { "block" }.into(),
            dense_parameters: 0,
            replicated_parameters: 2 * h * wide(self.norm),
            experts: None,
            multiplied_weights: 0,
            attention: None,
            saved_divided: 0,
            // Inputs of both norms and of the products behind them.
            saved_whole: 4 * h,
            saved_f32: 0,
        };
        match &self.latent {
            Some(latent) => self.add_latent_attention(&mut class, latent),
            None => self.add_attention(&mut class),
        }
        match self.experts.as_ref().filter(|_| routed) {
            Some(routing) => self.add_experts(&mut class, routing),
            None => self.add_mlp(&mut class, self.intermediate),
        }
        class
    }

    fn add_attention(&self, class: &mut LayerClass) {
        let h = wide(self.hidden);
        let (q, kv) = (wide(self.heads) * wide(self.head_dim), wide(self.kv_heads) * wide(self.head_dim));
        let matrices = h * q + 2 * h * kv + q * h;
        class.dense_parameters += matrices;
        class.multiplied_weights += matrices;
        class.replicated_parameters += if self.qkv_bias { q + 2 * kv } else { 0 };
        class.replicated_parameters += if self.out_bias { h } else { 0 };
        class.replicated_parameters += if self.head_norms { 2 * wide(self.head_dim) } else { 0 };
        // Queries, keys, values, attention's output.
        class.saved_divided += 2 * q + 2 * kv;
        class.attention = Some(Attention {
            heads: self.heads,
            score_dim: self.head_dim,
            value_dim: self.head_dim,
            window: self.window,
        });
    }

    fn add_latent_attention(&self, class: &mut LayerClass, latent: &Latent) {
        let h = wide(self.hidden);
        let heads = wide(self.heads);
        let score_dim = latent.nope_dim + latent.rope_dim;
        let q = heads * wide(score_dim);
        let kv_rank = wide(latent.kv_rank);
        let values = heads * wide(latent.value_dim);
        let queries = match latent.q_rank {
            Some(rank) => h * wide(rank) + wide(rank) * q,
            None => h * q,
        };
        let matrices = queries
            + h * (kv_rank + wide(latent.rope_dim))
            + kv_rank * heads * wide(latent.nope_dim + latent.value_dim)
            + values * h;
        class.dense_parameters += matrices;
        class.multiplied_weights += matrices;
        let q_rank = latent.q_rank.map_or(0, wide);
        class.replicated_parameters += q_rank + kv_rank;
        class.saved_whole += 2 * q_rank + 2 * kv_rank + wide(latent.rope_dim);
        // Queries, keys, values, attention's output.
        class.saved_divided += 2 * q + 2 * values;
        class.attention = Some(Attention {
            heads: self.heads,
            score_dim,
            value_dim: latent.value_dim,
            window: self.window,
        });
    }

    /// Parameters of the matrices of an MLP, and elements it saves a token.
    fn mlp(&self, intermediate: u32) -> (u64, u64) {
        let (h, f) = (wide(self.hidden), wide(intermediate));
        if self.gated { (3 * h * f, 3 * f) } else { (2 * h * f, 2 * f) }
    }

    fn add_mlp(&self, class: &mut LayerClass, intermediate: u32) {
        let (matrices, saved) = self.mlp(intermediate);
        class.dense_parameters += matrices;
        class.multiplied_weights += matrices;
        class.saved_divided += saved;
        if self.mlp_bias {
            class.replicated_parameters += wide(intermediate) + wide(self.hidden);
        }
    }

    fn add_experts(&self, class: &mut LayerClass, routing: &Routing) {
        let h = wide(self.hidden);
        let (parameters_each, saved) = self.mlp(routing.intermediate);
        let router = h * wide(routing.count);
        class.replicated_parameters += router;
        class.replicated_parameters += if routing.router_bias { wide(routing.count) } else { 0 };
        class.multiplied_weights += router;
        class.saved_f32 += wide(routing.count);
        if routing.shared > 0 {
            self.add_mlp(class, routing.shared);
            class.replicated_parameters += if routing.shared_gate { h } else { 0 };
        }
        class.experts = Some(Experts {
            count: routing.count,
            per_token: routing.per_token,
            parameters_each,
            // The token's copy, and what the expert keeps of it.
            saved_each: h + saved,
        });
    }
}

fn wide(size: u32) -> u64 {
    u64::from(size)
}
