//! Calls that are played alike on the engine and on the reference.

use std::ops::Range;
use std::time::Instant;

use hgct_core::init;
use hgct_core::model::{ModelSpec, RopeScaling, TensorSpec};
use hgct_core::plan::StageId;

use crate::engine::{BackwardPart, Edge, Engine, GradientReady, ImportRows, Lease, StageLoad, Ticket};

use super::Failure;
use super::compare::Value;

/// The stage that cases load.
pub(super) const STAGE: StageId = StageId(0);

/// A small model with everything that matters: more query than key heads, a width that is no
/// power of two, sizes that differ from each other.
pub(super) fn small_model() -> ModelSpec {
    ModelSpec {
        vocab_size: 96,
        hidden_size: 64,
        intermediate_size: 80,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        rms_norm_eps: 1e-5,
        rope_theta: 1000.0,
        rope_scaling: RopeScaling::Default,
        tie_embeddings: false,
        max_position: 128,
        // Large enough that attention and gates are far from linear.
        initializer_range: 0.12,
    }
}

/// A stage, its micro-batches and what becomes of them.
#[derive(Debug, Clone)]
pub(super) struct Case {
    pub(super) model: ModelSpec,
    pub(super) layers: Range<u32>,
    pub(super) recompute: bool,
    pub(super) samples: u64,
    pub(super) seq_len: u64,
    /// All of them are forwarded before the first backward, which comes first in, first out.
    pub(super) micro_batches: u32,
    /// The one of them that is dropped.
    pub(super) dropped: Option<u32>,
}

impl Case {
    /// One micro-batch of the small model.
    pub(super) fn new(layers: Range<u32>) -> Self {
        let model = small_model();
        Self { model, layers, recompute: false, samples: 2, seq_len: 32, micro_batches: 1, dropped: None }
    }

    /// Loads the stage and imports its parameters.
    pub(super) fn load(&self, engine: &mut dyn Engine) -> Result<(), Failure> {
        let stage = StageLoad {
            stage: STAGE,
            model: self.model.clone(),
            layers: self.layers.clone(),
            recompute: self.recompute,
        };
        engine.load(&[stage]).map_err(text)?;
        engine.import(STAGE, &self.parameters()).map_err(text)
    }

    /// A training step without its update: everything that the engine answers with.
    pub(super) fn step(&self, engine: &mut dyn Engine, deadline: Instant) -> Result<Vec<Value>, Failure> {
        let mut found = Vec::new();
        engine.zero_gradients(STAGE).map_err(text)?;
        for number in 0..self.micro_batches {
            let output = wait(engine.forward(STAGE, number, self.inputs(number)), deadline)?;
            record(&mut found, &format!("output of micro-batch {number}"), &output)?;
        }
        if let Some(number) = self.dropped {
            engine.drop_micro_batch(number).map_err(text)?;
        }
        let kept: Vec<u32> = (0..self.micro_batches).filter(|number| Some(*number) != self.dropped).collect();
        for number in &kept {
            let last = Some(number) == kept.last();
            let mut gradients = Vec::new();
            let gradient = self.backward(engine, *number, last.then_some(&mut gradients), deadline)?;
            record(&mut found, &format!("input gradient of micro-batch {number}"), &gradient)?;
            found.extend(gradients);
        }
        Ok(found)
    }

    /// [`Case::load`] and [`Case::step`].
    pub(super) fn play(&self, engine: &mut dyn Engine, deadline: Instant) -> Result<Vec<Value>, Failure> {
        self.load(engine)?;
        self.step(engine, deadline)
    }

    /// Backward of one micro-batch; with `gradients` it is the last one, and they are filled.
    pub(super) fn backward(
        &self,
        engine: &mut dyn Engine,
        number: u32,
        gradients: Option<&mut Vec<Value>>,
        deadline: Instant,
    ) -> Result<Edge, Failure> {
        let seed = self.seed(number);
        let Some(gradients) = gradients else {
            return wait(engine.backward(STAGE, number, BackwardPart::Full, seed, None), deadline);
        };
        let mut wrong = None;
        let mut next = self.layers.end;
        let mut ready = |layer: u32, leases: Vec<Lease>| {
            if layer >= next {
                wrong.get_or_insert(format!("layer {layer} is ready, but not before layer {next}"));
            }
            next = layer;
            for lease in leases {
                match Value::of(format!("gradient of {} at layer {layer}", lease.name), &lease) {
                    Ok(value) => gradients.push(value),
                    Err(failure) => wrong = Some(failure),
                }
            }
            Ok(())
        };
        let ready: &mut GradientReady<'_> = &mut ready;
        let answer = wait(engine.backward(STAGE, number, BackwardPart::Full, seed, Some(ready)), deadline)?;
        wrong.map_or(Ok(answer), Err)
    }

    /// All parameters of the stage, far from their initial values: gains of norms are not one.
    pub(super) fn parameters(&self) -> Vec<ImportRows> {
        let tensors = self.model.stage_tensors(self.layers.clone());
        tensors.iter().map(|(_, tensor)| ImportRows { lease: self.parameter(tensor), first_row: 0 }).collect()
    }

    fn parameter(&self, tensor: &TensorSpec) -> Lease {
        let mut values = normal(&tensor.name, tensor.num_elements());
        let (middle, range) =
            if tensor.decays() { (0.0, self.model.initializer_range as f32) } else { (1.0, 0.2) };
        for x in &mut values {
            *x = middle + *x * range;
        }
        Lease::of_f32(&tensor.name, tensor.shape.clone(), values)
    }

    /// Inputs of a micro-batch, unlike those of every other.
    pub(super) fn inputs(&self, number: u32) -> Edge {
        let mut edge = self.inputs_without_labels(number);
        if self.layers.end == self.model.num_placeable_layers() {
            edge.tensors.push(self.tokens("labels", number));
        }
        edge
    }

    /// Inputs as [`Engine::logits`] takes them.
    pub(super) fn inputs_without_labels(&self, number: u32) -> Edge {
        let first = if self.layers.start == 0 {
            self.tokens("input_ids", number)
        } else {
            self.hidden("input", number)
        };
        Edge::new(vec![first])
    }

    /// The gradient of a micro-batch's output, unlike that of every other.
    fn seed(&self, number: u32) -> Edge {
        let head = self.layers.end == self.model.num_placeable_layers();
        Edge::new(if head { Vec::new() } else { vec![self.hidden("seed", number)] })
    }

    fn hidden(&self, label: &str, number: u32) -> Lease {
        let shape = vec![self.samples, self.seq_len, u64::from(self.model.hidden_size)];
        let values = normal(&format!("{label} {number}"), shape.iter().product());
        Lease::of_f32("hidden", shape, values)
    }

    fn tokens(&self, name: &str, number: u32) -> Lease {
        let shape = vec![self.samples, self.seq_len];
        let random = normal(&format!("{name} {number}"), shape.iter().product());
        let vocab = self.model.vocab_size as i32;
        Lease::of_i32(name, shape, random.iter().map(|x| (x.abs() * 1e4) as i32 % vocab).collect())
    }
}

/// Standard normal values that depend on the label alone.
pub(super) fn normal(label: &str, count: u64) -> Vec<f32> {
    let model = ModelSpec { initializer_range: 1.0, ..small_model() };
    let mut values = vec![0.0; count as usize];
    init::fill(&model, 1, &TensorSpec { name: label.into(), shape: vec![1, count] }, 0, &mut values);
    values
}

/// Waits for an answer.
pub(super) fn wait(ticket: crate::Result<Ticket<Edge>>, deadline: Instant) -> Result<Edge, Failure> {
    let answer = ticket.and_then(|ticket| ticket.wait(deadline)).map_err(text)?;
    if Instant::now() > deadline {
        Err("took longer than its share of the budget".into())
    } else {
        Ok(answer)
    }
}

/// An error with its causes.
#[allow(clippy::needless_pass_by_value, reason = "what `map_err` takes")]
pub(super) fn text(error: crate::Error) -> Failure {
    crate::error_chain(&error)
}

/// Appends what an edge holds.
pub(super) fn record(found: &mut Vec<Value>, label: &str, edge: &Edge) -> Result<(), Failure> {
    for lease in &edge.tensors {
        found.push(Value::of(format!("{} ({label})", lease.name), lease)?);
    }
    Ok(())
}
