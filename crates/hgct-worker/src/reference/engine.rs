//! The reference model behind the engine interface.

use std::collections::BTreeMap;
use std::ops::Range;

use hgct_core::dtype::DType;
use hgct_core::model::{LayerKind, ModelSpec, TensorSpec};
use hgct_core::plan::StageId;

use super::layers::{Input, Layer, Saved, Tensors};
use crate::engine::{
    BackwardPart, Edge, Engine, EngineDescription, GradientReady, Granularity, ImportRows, Lease, StageLoad,
    Ticket,
};
use crate::{Error, Result};

const NAME: &str = "reference";

/// An [`Engine`] over the plain f64 model: f64 inside, f32 at leases. Slow, exact, deterministic.
#[derive(Debug)]
pub struct ReferenceEngine {
    description: EngineDescription,
    stages: BTreeMap<StageId, Stage>,
    in_flight: BTreeMap<(StageId, u32), MicroBatch>,
}

/// A loaded stage instance.
#[derive(Debug)]
struct Stage {
    model: ModelSpec,
    layers: Range<u32>,
    recompute: bool,
    /// Tensors, each with the layer that reports its gradient.
    tensors: Vec<(u32, TensorSpec)>,
    parameters: Tensors,
    gradients: Tensors,
}

/// What is kept of a forward.
#[derive(Debug)]
struct MicroBatch {
    shape: [u64; 2],
    labels: Vec<usize>,
    /// Input and activations of each layer; with recompute the input only.
    layers: Vec<(Input, Option<Saved>)>,
    /// Elements of the output.
    num_outputs: usize,
}

/// Checked inputs of a stage.
struct StageInput {
    shape: [u64; 2],
    input: Input,
    labels: Vec<usize>,
}

impl Default for ReferenceEngine {
    fn default() -> Self {
        Self::new()
    }
}

impl ReferenceEngine {
    /// An engine with nothing loaded.
    pub fn new() -> Self {
        let description = EngineDescription {
            engine: NAME.into(),
            framework_version: env!("CARGO_PKG_VERSION").into(),
            device: "cpu".into(),
            dtypes: vec![DType::F32],
            granularity: Granularity::Layer,
            split_backward: false,
            recompute: true,
            tensor_parallel: false,
            deterministic: true,
            memory_bytes: None,
        };
        Self { description, stages: BTreeMap::new(), in_flight: BTreeMap::new() }
    }

    fn stage(&mut self, operation: &'static str, stage: StageId) -> Result<&mut Stage> {
        self.stages.get_mut(&stage).ok_or_else(|| failed(operation, format!("{stage} is not loaded")))
    }
}

impl Engine for ReferenceEngine {
    fn describe(&self) -> &EngineDescription {
        &self.description
    }

    fn load(&mut self, stages: &[StageLoad]) -> Result<()> {
        self.in_flight.clear();
        self.stages = stages.iter().map(|load| Ok((load.stage, Stage::new(load)?))).collect::<Result<_>>()?;
        Ok(())
    }

    fn import(&mut self, stage: StageId, rows: &[ImportRows]) -> Result<()> {
        let stage = self.stage("import", stage)?;
        rows.iter().try_for_each(|rows| stage.import(rows))
    }

    fn export(&mut self, stage: StageId, names: &[String]) -> Result<Vec<Lease>> {
        let stage = self.stage("export", stage)?;
        names
            .iter()
            .map(|name| {
                let (_, tensor) = stage.tensor("export", name)?;
                Ok(lease(name, &tensor.shape, &stage.parameters[name]))
            })
            .collect()
    }

    fn zero_gradients(&mut self, stage: StageId) -> Result<()> {
        self.stage("zero_gradients", stage)?.gradients.values_mut().for_each(|values| values.fill(0.0));
        Ok(())
    }

    fn forward(&mut self, stage: StageId, micro_batch: u32, inputs: Edge) -> Result<Ticket<Edge>> {
        if self.in_flight.contains_key(&(stage, micro_batch)) {
            return Err(failed("forward", format!("micro-batch {micro_batch} is in flight already")));
        }
        let loaded = self.stage("forward", stage)?;
        let input = loaded.input("forward", inputs, loaded.ends_in_head())?;
        let (output, kept) = loaded.forward(input);
        self.in_flight.insert((stage, micro_batch), kept);
        Ok(Ticket::Ready(output))
    }

    fn backward(
        &mut self,
        stage: StageId,
        micro_batch: u32,
        part: BackwardPart,
        gradients: Edge,
        ready: Option<&mut GradientReady<'_>>,
    ) -> Result<Ticket<Edge>> {
        if part != BackwardPart::Full {
            return Err(failed("backward", "only a full backward is supported yet".into()));
        }
        let loaded = self.stage("backward", stage)?;
        let seed = loaded.seed(gradients)?;
        let kept = self
            .in_flight
            .remove(&(stage, micro_batch))
            .ok_or_else(|| failed("backward", format!("micro-batch {micro_batch} is not in flight")))?;
        if seed.len() != kept.num_outputs {
            return Err(failed("backward", format!("a gradient of {} elements does not fit", seed.len())));
        }
        self.stage("backward", stage)?.backward(&kept, seed, ready).map(Ticket::Ready)
    }

    fn evaluate(&mut self, stage: StageId, inputs: Edge) -> Result<Ticket<Edge>> {
        let stage = self.stage("evaluate", stage)?;
        let input = stage.input("evaluate", inputs, stage.ends_in_head())?;
        Ok(Ticket::Ready(stage.forward(input).0))
    }

    fn logits(&mut self, stage: StageId, inputs: Edge) -> Result<Ticket<Edge>> {
        let stage = self.stage("logits", stage)?;
        let input = stage.input("logits", inputs, false)?;
        Ok(Ticket::Ready(stage.logits(input)))
    }

    fn drop_micro_batch(&mut self, micro_batch: u32) -> Result<()> {
        self.in_flight.retain(|(_, number), _| *number != micro_batch);
        Ok(())
    }

    fn abort(&mut self) -> Result<()> {
        self.in_flight.clear();
        Ok(())
    }
}

impl Stage {
    fn new(load: &StageLoad) -> Result<Self> {
        if load.layers.is_empty() || load.layers.end > load.model.num_placeable_layers() {
            return Err(failed("load", format!("the model has no layers {:?}", load.layers)));
        }
        let tensors = load.model.stage_tensors(load.layers.clone());
        let zeros: Tensors =
            tensors.iter().map(|(_, t)| (t.name.clone(), vec![0.0; t.num_elements() as usize])).collect();
        Ok(Self {
            model: load.model.clone(),
            layers: load.layers.clone(),
            recompute: load.recompute,
            tensors,
            gradients: zeros.clone(),
            parameters: zeros,
        })
    }

    fn ends_in_head(&self) -> bool {
        self.layers.end == self.model.num_placeable_layers()
    }

    fn layer(&self, index: u32, shape: [u64; 2]) -> Layer<'_> {
        Layer { model: &self.model, index, seq_len: shape[1] as usize }
    }

    fn tensor(&self, operation: &'static str, name: &str) -> Result<&(u32, TensorSpec)> {
        self.tensors
            .iter()
            .find(|(_, tensor)| tensor.name == name)
            .ok_or_else(|| failed(operation, format!("the stage has no tensor {name}")))
    }

    fn import(&mut self, rows: &ImportRows) -> Result<()> {
        let name = &rows.lease.name;
        let (_, tensor) = self.tensor("import", name)?;
        let width = tensor.row_elements() as usize;
        let begin = rows.first_row as usize * width;
        let values = f32_values(&rows.lease)?;
        let target = self
            .parameters
            .get_mut(name)
            .and_then(|all| all.get_mut(begin..begin + values.len()))
            .filter(|target| target.len().is_multiple_of(width))
            .ok_or_else(|| {
                let (first, shape) = (rows.first_row, &rows.lease.shape);
                failed("import", format!("{shape:?} from row {first} does not fit {name}"))
            })?;
        for (target, value) in target.iter_mut().zip(values) {
            *target = f64::from(value);
        }
        Ok(())
    }

    fn input(&self, operation: &'static str, mut edge: Edge, with_labels: bool) -> Result<StageInput> {
        if edge.first_position != 0 {
            return Err(failed(operation, "only whole sequences are supported yet".into()));
        }
        let mut take = |name: &'static str| {
            edge.take(name).ok_or(Error::Answer { engine: NAME.into(), operation, missing: name })
        };
        let (shape, input) = if self.layers.start == 0 {
            let (shape, ids) = self.tokens(operation, &take("input_ids")?)?;
            (shape, Input::Ids(ids))
        } else {
            let hidden = take("hidden")?;
            let [samples, seq_len, width] = hidden.shape[..] else {
                return Err(failed(operation, format!("{hidden:?} must have three dimensions")));
            };
            let values: Vec<f64> = f32_values(&hidden)?.into_iter().map(f64::from).collect();
            if width != u64::from(self.model.hidden_size) || values.len() as u64 != samples * seq_len * width
            {
                return Err(failed(operation, format!("{hidden:?} does not fit the model")));
            }
            ([samples, seq_len], Input::Hidden(values))
        };
        let labels = if with_labels {
            let (labels_shape, labels) = self.tokens(operation, &take("labels")?)?;
            if labels_shape != shape {
                return Err(failed(operation, format!("labels are {labels_shape:?}, inputs {shape:?}")));
            }
            labels
        } else {
            Vec::new()
        };
        Ok(StageInput { shape, input, labels })
    }

    fn tokens(&self, operation: &'static str, lease: &Lease) -> Result<([u64; 2], Vec<usize>)> {
        let vocab = self.model.vocab_size;
        let [samples, seq_len] = lease.shape[..] else {
            return Err(failed(operation, format!("{lease:?} must have two dimensions")));
        };
        let tokens = i32_values(lease)?
            .into_iter()
            .map(|token| match usize::try_from(token) {
                Ok(token) if token < vocab as usize => Ok(token),
                _ => Err(failed(operation, format!("{}: token {token} is not below {vocab}", lease.name))),
            })
            .collect::<Result<Vec<_>>>()?;
        if seq_len == 0 || tokens.len() as u64 != samples * seq_len {
            return Err(failed(operation, format!("{lease:?} holds {} tokens", tokens.len())));
        }
        Ok(([samples, seq_len], tokens))
    }

    fn forward(&self, from: StageInput) -> (Edge, MicroBatch) {
        let mut layers = Vec::new();
        let mut input = from.input;
        for index in self.layers.clone() {
            let (output, saved) =
                self.layer(index, from.shape).forward(&self.parameters, &input, &from.labels);
            let entered = std::mem::replace(&mut input, Input::Hidden(output));
            layers.push((entered, (!self.recompute).then_some(saved)));
        }
        let num_outputs = input.hidden().len();
        let output = if self.ends_in_head() {
            lease("loss_sum", &[1], input.hidden())
        } else {
            self.hidden(from.shape, input.hidden())
        };
        (Edge::new(vec![output]), MicroBatch { shape: from.shape, labels: from.labels, layers, num_outputs })
    }

    fn logits(&self, from: StageInput) -> Edge {
        let mut input = from.input;
        let [samples, seq_len] = from.shape;
        for index in self.layers.clone() {
            let layer = self.layer(index, from.shape);
            if self.model.layer_kind(index) == LayerKind::Head {
                let (_, logits) = layer.logits(&self.parameters, &input);
                let shape = [samples, seq_len, u64::from(self.model.vocab_size)];
                return Edge::new(vec![lease("logits", &shape, &logits)]);
            }
            input = Input::Hidden(layer.forward(&self.parameters, &input, &[]).0);
        }
        Edge::new(vec![self.hidden(from.shape, input.hidden())])
    }

    /// The output's gradient: one for the loss, else what the next stage sent.
    fn seed(&self, mut gradients: Edge) -> Result<Vec<f64>> {
        if self.ends_in_head() {
            return Ok(vec![1.0]);
        }
        let missing = Error::Answer { engine: NAME.into(), operation: "backward", missing: "hidden" };
        Ok(f32_values(&gradients.take("hidden").ok_or(missing)?)?.into_iter().map(f64::from).collect())
    }

    fn backward(
        &mut self,
        kept: &MicroBatch,
        seed: Vec<f64>,
        mut ready: Option<&mut GradientReady<'_>>,
    ) -> Result<Edge> {
        let mut gradient = seed;
        let mut gradients = std::mem::take(&mut self.gradients);
        let mut reported = Ok(());
        for (index, (input, saved)) in self.layers.clone().zip(&kept.layers).rev() {
            let layer = self.layer(index, kept.shape);
            let again = match saved {
                Some(_) => None,
                None => Some(layer.forward(&self.parameters, input, &kept.labels).1),
            };
            if let Some(saved) = saved.as_ref().or(again.as_ref()) {
                gradient = layer.backward(&self.parameters, input, saved, &gradient, &mut gradients);
            }
            if let (Some(ready), true) = (ready.as_deref_mut(), reported.is_ok()) {
                let of_layer = self.tensors.iter().filter(|(layer, _)| *layer == index);
                let leases = of_layer.map(|(_, t)| lease(&t.name, &t.shape, &gradients[&t.name])).collect();
                reported = ready(index, leases);
            }
        }
        self.gradients = gradients;
        reported?;
        let whole = self.layers.start == 0;
        Ok(Edge::new(if whole { Vec::new() } else { vec![self.hidden(kept.shape, &gradient)] }))
    }

    fn hidden(&self, [samples, seq_len]: [u64; 2], values: &[f64]) -> Lease {
        lease("hidden", &[samples, seq_len, u64::from(self.model.hidden_size)], values)
    }
}

fn lease(name: &str, shape: &[u64], values: &[f64]) -> Lease {
    Lease::of_f32(name, shape.to_vec(), values.iter().map(|x| *x as f32).collect())
}

/// Values of an f32 lease of any alignment.
fn f32_values(lease: &Lease) -> Result<Vec<f32>> {
    elements(lease, DType::F32, f32::from_le_bytes)
}

/// Values of an i32 lease of any alignment.
fn i32_values(lease: &Lease) -> Result<Vec<i32>> {
    elements(lease, DType::I32, i32::from_le_bytes)
}

fn elements<T>(lease: &Lease, dtype: DType, of: fn([u8; 4]) -> T) -> Result<Vec<T>> {
    let (elements, rest) = lease.bytes().as_chunks::<4>();
    if lease.dtype != dtype || !rest.is_empty() {
        return Err(Error::Lease { name: lease.name.clone(), found: lease.dtype, expected: dtype });
    }
    Ok(elements.iter().map(|bytes| of(*bytes)).collect())
}

fn failed(operation: &'static str, message: String) -> Error {
    Error::Engine { engine: NAME.into(), operation, message }
}
