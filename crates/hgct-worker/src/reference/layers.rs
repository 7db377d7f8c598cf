//! Embedding, decoder block and head of a Llama-family model, forward and backward.

use std::collections::BTreeMap;

use hgct_core::model::{EMBEDDING, LayerKind, ModelSpec};

use super::operators::{
    Heads, add, attention, attention_backward, cross_entropy_sum, linear, linear_backward, rms_norm,
    rms_norm_backward, rotate, swiglu, swiglu_backward,
};

/// Parameters or gradients by tensor name, row-major.
pub(super) type Tensors = BTreeMap<String, Vec<f64>>;

/// What enters a layer.
#[derive(Debug, Clone)]
pub(super) enum Input {
    /// Token ids `[samples, seq_len]`.
    Ids(Vec<usize>),
    /// The residual stream `[samples, seq_len, hidden_size]`.
    Hidden(Vec<f64>),
}

impl Input {
    /// The residual stream; empty for token ids, which only the embedding reads.
    pub(super) fn hidden(&self) -> &[f64] {
        match self {
            Self::Ids(_) => &[],
            Self::Hidden(hidden) => hidden,
        }
    }
}

/// What backward needs of a layer's forward.
#[derive(Debug)]
pub(super) enum Saved {
    Embedding,
    Block(Box<Block>),
    Head { normed: Vec<f64>, dlogits: Vec<f64> },
}

/// Activations of a decoder block.
#[derive(Debug)]
pub(super) struct Block {
    normed: Vec<f64>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    weights: Vec<f64>,
    attended: Vec<f64>,
    middle: Vec<f64>,
    middle_normed: Vec<f64>,
    gate: Vec<f64>,
    up: Vec<f64>,
    activated: Vec<f64>,
}

/// One layer of a model, for sequences of one length.
pub(super) struct Layer<'a> {
    pub(super) model: &'a ModelSpec,
    pub(super) index: u32,
    pub(super) seq_len: usize,
}

impl Layer<'_> {
    /// The layer's output and what backward needs. The head answers with the loss sum, as one
    /// element; it needs labels.
    pub(super) fn forward(&self, w: &Tensors, input: &Input, labels: &[usize]) -> (Vec<f64>, Saved) {
        match self.model.layer_kind(self.index) {
            LayerKind::Embedding => (self.embed(w, input), Saved::Embedding),
            LayerKind::Block => {
                let (output, block) = self.block(w, input.hidden());
                (output, Saved::Block(Box::new(block)))
            }
            LayerKind::Head => {
                let (normed, logits) = self.logits(w, input);
                let (loss, dlogits) = cross_entropy_sum(&logits, labels);
                (vec![loss], Saved::Head { normed, dlogits })
            }
        }
    }

    /// Adds parameter gradients to `dw`; answers with the gradient of the layer's input, which is
    /// empty for the embedding.
    pub(super) fn backward(
        &self,
        w: &Tensors,
        input: &Input,
        saved: &Saved,
        dout: &[f64],
        dw: &mut Tensors,
    ) -> Vec<f64> {
        match saved {
            Saved::Embedding => {
                if let Input::Ids(ids) = input {
                    self.embed_backward(ids, dout, dw);
                }
                Vec::new()
            }
            Saved::Block(block) => self.block_backward(w, input.hidden(), block, dout, dw),
            Saved::Head { normed, dlogits } => {
                let dlogits: Vec<f64> = dlogits.iter().map(|d| d * dout[0]).collect();
                let head = self.head_name();
                let dnormed = linear_backward(normed, &w[head], self.width(), &dlogits, grad(dw, head));
                self.norm_backward(w, "model.norm.weight", input.hidden(), &dnormed, dw)
            }
        }
    }

    /// The head's normalised input and logits `[samples, seq_len, vocab]`.
    pub(super) fn logits(&self, w: &Tensors, input: &Input) -> (Vec<f64>, Vec<f64>) {
        let normed = rms_norm(input.hidden(), &w["model.norm.weight"], self.model.rms_norm_eps);
        let logits = linear(&normed, &w[self.head_name()], self.width());
        (normed, logits)
    }

    fn embed(&self, w: &Tensors, input: &Input) -> Vec<f64> {
        let (Input::Ids(ids), width) = (input, self.width()) else { return Vec::new() };
        ids.iter().flat_map(|id| &w[EMBEDDING][id * width..(id + 1) * width]).copied().collect()
    }

    fn embed_backward(&self, ids: &[usize], dout: &[f64], dw: &mut Tensors) {
        let width = self.width();
        let dtable = grad(dw, EMBEDDING);
        for (id, dout) in ids.iter().zip(dout.chunks_exact(width)) {
            for (dtable, dout) in dtable[id * width..].iter_mut().zip(dout) {
                *dtable += dout;
            }
        }
    }

    fn block(&self, w: &Tensors, x: &[f64]) -> (Vec<f64>, Block) {
        let width = self.width();
        let (heads, frequencies) = (self.heads(), self.model.inverse_frequencies());
        let of = |suffix: &str| &w[&self.name(suffix)][..];

        let normed = rms_norm(x, of("input_layernorm"), self.model.rms_norm_eps);
        let mut q = linear(&normed, of("self_attn.q_proj"), width);
        let mut k = linear(&normed, of("self_attn.k_proj"), width);
        let v = linear(&normed, of("self_attn.v_proj"), width);
        rotate(&mut q, self.seq_len, heads.query, &frequencies, 1.0);
        rotate(&mut k, self.seq_len, heads.kv, &frequencies, 1.0);
        let (attended, weights) = attention(heads, &q, &k, &v);
        let projected = linear(&attended, of("self_attn.o_proj"), heads.query * heads.head_dim);
        let middle = add(x, &projected);

        let middle_normed = rms_norm(&middle, of("post_attention_layernorm"), self.model.rms_norm_eps);
        let gate = linear(&middle_normed, of("mlp.gate_proj"), width);
        let up = linear(&middle_normed, of("mlp.up_proj"), width);
        let activated = swiglu(&gate, &up);
        let down = linear(&activated, of("mlp.down_proj"), self.model.intermediate_size as usize);
        let output = add(&middle, &down);
        (output, Block { normed, q, k, v, weights, attended, middle, middle_normed, gate, up, activated })
    }

    fn block_backward(
        &self,
        w: &Tensors,
        x: &[f64],
        saved: &Block,
        dout: &[f64],
        dw: &mut Tensors,
    ) -> Vec<f64> {
        let (heads, frequencies) = (self.heads(), self.model.inverse_frequencies());
        let (width, intermediate) = (self.width(), self.model.intermediate_size as usize);

        let dactivated = self.linear_backward(w, ("mlp.down_proj", intermediate), &saved.activated, dout, dw);
        let (dgate, dup) = swiglu_backward(&saved.gate, &saved.up, &dactivated);
        let dmiddle_normed = add(
            &self.linear_backward(w, ("mlp.gate_proj", width), &saved.middle_normed, &dgate, dw),
            &self.linear_backward(w, ("mlp.up_proj", width), &saved.middle_normed, &dup, dw),
        );
        let norm = self.name("post_attention_layernorm");
        let dmiddle = add(dout, &self.norm_backward(w, &norm, &saved.middle, &dmiddle_normed, dw));

        let dattended = self.linear_backward(
            w,
            ("self_attn.o_proj", heads.query * heads.head_dim),
            &saved.attended,
            &dmiddle,
            dw,
        );
        let (mut dq, mut dk, dv) =
            attention_backward(heads, &saved.q, &saved.k, &saved.v, &saved.weights, &dattended);
        rotate(&mut dq, self.seq_len, heads.query, &frequencies, -1.0);
        rotate(&mut dk, self.seq_len, heads.kv, &frequencies, -1.0);
        let dnormed = add(
            &add(
                &self.linear_backward(w, ("self_attn.q_proj", width), &saved.normed, &dq, dw),
                &self.linear_backward(w, ("self_attn.k_proj", width), &saved.normed, &dk, dw),
            ),
            &self.linear_backward(w, ("self_attn.v_proj", width), &saved.normed, &dv, dw),
        );
        add(&dmiddle, &self.norm_backward(w, &self.name("input_layernorm"), x, &dnormed, dw))
    }

    /// Backward of the block's linear `suffix`, whose input `x` has rows of `width`.
    fn linear_backward(
        &self,
        w: &Tensors,
        (suffix, width): (&str, usize),
        x: &[f64],
        dy: &[f64],
        dw: &mut Tensors,
    ) -> Vec<f64> {
        let name = self.name(suffix);
        linear_backward(x, &w[&name], width, dy, grad(dw, &name))
    }

    fn norm_backward(&self, w: &Tensors, name: &str, x: &[f64], dy: &[f64], dw: &mut Tensors) -> Vec<f64> {
        rms_norm_backward(x, &w[name], self.model.rms_norm_eps, dy, grad(dw, name))
    }

    fn head_name(&self) -> &'static str {
        if self.model.tie_embeddings { EMBEDDING } else { "lm_head.weight" }
    }

    fn name(&self, suffix: &str) -> String {
        format!("model.layers.{}.{suffix}.weight", self.index - 1)
    }

    fn width(&self) -> usize {
        self.model.hidden_size as usize
    }

    fn heads(&self) -> Heads {
        Heads {
            seq_len: self.seq_len,
            query: self.model.num_heads as usize,
            kv: self.model.num_kv_heads as usize,
            head_dim: self.model.head_dim as usize,
        }
    }
}

/// The gradient of a tensor, which every loaded stage has for each of its parameters.
fn grad<'a>(dw: &'a mut Tensors, name: &str) -> &'a mut [f64] {
    dw.get_mut(name).map_or(&mut [], Vec::as_mut_slice)
}
