//! A loaded stage: its parameters, gradients and micro-batches in flight.

use std::collections::{BTreeMap, BTreeSet};

use burn_tensor::{Device, Int, Tensor, TensorData, Transaction};
use hgct_core::dtype::DType;
use hgct_core::model::{LayerKind, ModelSpec, TensorSpec};
use hgct_worker::engine::{Edge, GradientReady, ImportRows, Lease, StageLoad};
use hgct_worker::{Error, Result};

use crate::error::{NAME, failed};
use crate::model::{self, Tables};

/// A loaded stage.
pub(crate) struct Stage {
    model: ModelSpec,
    layers: Vec<Layer>,
    recompute: bool,
    device: Device,
    /// The most that one tensor may take.
    largest_tensor_bytes: u64,
    tensors: BTreeMap<String, TensorSpec>,
    /// Leaves that require gradients.
    parameters: BTreeMap<String, Tensor<2>>,
    gradients: BTreeMap<String, Tensor<2>>,
    pub(crate) live: BTreeMap<u32, MicroBatch>,
    tables: BTreeMap<usize, Tables>,
}

struct Layer {
    index: u32,
    kind: LayerKind,
    /// Its parameters, in the model's order.
    names: Vec<String>,
    /// Those whose gradients are final with it: a tied embedding's are at the lower end only.
    last_of: Vec<String>,
}

/// What is kept of a forward.
pub(crate) struct MicroBatch {
    shape: [usize; 2],
    labels: Option<Tensor<1, Int>>,
    kept: Vec<Kept>,
}

/// A layer's input, and its graph unless it is computed again.
struct Kept {
    input: Input,
    graph: Option<Graph>,
}

/// A leaf (none for the embedding) and what was computed from it.
struct Graph {
    leaf: Option<Tensor<2>>,
    output: Output,
}

#[derive(Clone)]
enum Input {
    Ids(Tensor<1, Int>),
    Hidden(Tensor<2>),
}

enum Output {
    Hidden(Tensor<2>),
    Loss(Tensor<1>),
}

/// Checked inputs.
struct Inputs {
    shape: [usize; 2],
    input: Input,
    labels: Option<Tensor<1, Int>>,
}

impl Stage {
    /// Makes room for a stage whose tensors may take `largest_tensor_bytes` each.
    pub(crate) fn new(load: &StageLoad, device: &Device, largest_tensor_bytes: u64) -> Result<Self> {
        if load.layers.is_empty() || load.layers.end > load.model.num_placeable_layers() {
            return Err(failed("load", format!("the model has no layers {:?}", load.layers)));
        }
        let mut seen = BTreeSet::new();
        let mut layers = Vec::new();
        let mut tensors = BTreeMap::new();
        for index in load.layers.clone() {
            let specs = load.model.layer_tensors(index);
            let names: Vec<String> = specs.iter().map(|spec| spec.name.clone()).collect();
            let last_of = names.iter().filter(|name| seen.insert((*name).clone())).cloned().collect();
            layers.push(Layer { index, kind: load.model.layer_kind(index), names, last_of });
            tensors.extend(specs.into_iter().map(|spec| (spec.name.clone(), spec)));
        }
        for spec in tensors.values() {
            binds(&format!("values of {}", spec.name), 4 * spec.num_elements(), largest_tensor_bytes)
                .map_err(|message| failed("load", message))?;
        }
        let zeros = |spec: &TensorSpec| leaf(Tensor::zeros(dims(spec), device));
        Ok(Self {
            model: load.model.clone(),
            layers,
            recompute: load.recompute,
            device: device.clone(),
            largest_tensor_bytes,
            parameters: tensors.iter().map(|(name, spec)| (name.clone(), zeros(spec))).collect(),
            tensors,
            gradients: BTreeMap::new(),
            live: BTreeMap::new(),
            tables: BTreeMap::new(),
        })
    }

    /// Fails where a parameter found no memory. Another thread takes it, and tells only who reads.
    pub(crate) fn is_there(&self) -> Result<()> {
        let first = |(name, parameter): (&String, &Tensor<2>)| {
            (name.clone(), vec![1], parameter.clone().inner().slice([0..1, 0..1]))
        };
        read("load", self.parameters.iter().map(first).collect()).map(drop)
    }

    pub(crate) fn import(&mut self, rows: &[ImportRows]) -> Result<()> {
        let mut pieces: BTreeMap<&str, Vec<&ImportRows>> = BTreeMap::new();
        for row in rows {
            pieces.entry(&row.lease.name).or_default().push(row);
        }
        for (name, mut pieces) in pieces {
            pieces.sort_by_key(|piece| piece.first_row);
            let spec = self.spec("import", name)?.clone();
            let width = spec.row_elements();
            let mut parts = Vec::new();
            for piece in pieces {
                let values = f32_values(&piece.lease)?;
                let begin = piece.first_row * width;
                let end = begin + values.len() as u64;
                if !end.is_multiple_of(width.max(1)) || end > spec.num_elements() {
                    let (shape, first) = (&piece.lease.shape, piece.first_row);
                    return Err(failed("import", format!("{shape:?} from row {first} does not fit {name}")));
                }
                parts.push((begin, values));
            }
            let value = self.assembled(&spec, parts);
            self.parameters.insert(name.to_owned(), leaf(value));
        }
        Ok(())
    }

    /// A tensor with `parts` (first element, values; ascending) in place. A whole one is put
    /// together here, since then the device does not copy it once more.
    fn assembled(&self, spec: &TensorSpec, mut parts: Vec<(u64, Vec<f32>)>) -> Tensor<2> {
        let [rows, columns] = dims(spec);
        let mut next = 0;
        let whole = parts.iter().all(|(begin, values)| {
            let joins = *begin == next;
            next = begin + values.len() as u64;
            joins
        });
        if whole && next == spec.num_elements() {
            let mut all = std::mem::take(&mut parts[0].1);
            parts[1..].iter().for_each(|(_, values)| all.extend_from_slice(values));
            return Tensor::from_data(TensorData::new(all, [rows, columns]), &self.device);
        }
        let mut value = self.parameters[&spec.name].clone().inner();
        for (begin, values) in parts {
            let (begin, count) = (begin as usize, values.len());
            let (shape, row, column) = if spec.shape.len() == 1 {
                ([1, count], 0..1, begin..begin + count)
            } else {
                let first = begin / columns;
                ([count / columns, columns], first..first + count / columns, 0..columns)
            };
            let part = Tensor::from_data(TensorData::new(values, shape), &self.device);
            value = value.slice_assign([row, column], part);
        }
        value
    }

    /// Compiles every kernel of a step by running one: forward, backward with gradients read, and
    /// evaluation. Nothing of it stays.
    pub(crate) fn warm_up(&mut self, samples: u64, seq_len: u64) -> Result<()> {
        // A number that no plan uses.
        const MICRO_BATCH: u32 = u32::MAX;
        let (tokens, width) = (vec![samples, seq_len], self.hidden_size());
        let count = (samples * seq_len) as usize;
        let hidden = || {
            let shape = vec![samples, seq_len, width];
            Lease::of_f32("hidden", shape, vec![0.01; count * width as usize])
        };
        let ids = |name: &str| Lease::of_i32(name, tokens.clone(), vec![0; count]);
        let inputs = |stage: &Self| {
            let first = if stage.has_embedding() { ids("input_ids") } else { hidden() };
            let labels = stage.has_head().then(|| ids("labels"));
            Edge::new(std::iter::once(first).chain(labels).collect())
        };
        // Twice: what accumulates does so at the second.
        for _ in 0..2 {
            let edge = inputs(self);
            self.forward(MICRO_BATCH, edge)?;
            let gradients = if self.has_head() { Edge::default() } else { Edge::new(vec![hidden()]) };
            self.backward(MICRO_BATCH, gradients, Some(&mut |_, _| Ok(())))?;
        }
        let edge = inputs(self);
        self.evaluate("evaluate", edge, false)?;
        self.zero_gradients();
        Ok(())
    }

    pub(crate) fn export(&self, names: &[String]) -> Result<Vec<Lease>> {
        let named = names.iter().map(|name| {
            let spec = self.spec("export", name)?;
            Ok((name.clone(), spec.shape.clone(), self.parameters[name].clone().inner()))
        });
        read("export", named.collect::<Result<_>>()?)
    }

    pub(crate) fn zero_gradients(&mut self) {
        self.gradients.clear();
    }

    pub(crate) fn forward(&mut self, micro_batch: u32, edge: Edge) -> Result<Edge> {
        if self.live.contains_key(&micro_batch) {
            return Err(failed("forward", format!("micro-batch {micro_batch} is in flight already")));
        }
        let inputs = self.inputs("forward", edge, self.has_head())?;
        let tables = self.tables(inputs.shape[1]);
        let (mut input, mut kept, mut last) = (inputs.input, Vec::new(), None);
        for layer in &self.layers {
            let (output, graph) = if self.recompute {
                (self.infer(layer, input.clone(), inputs.labels.as_ref(), &tables), None)
            } else {
                let graph = self.graph(layer, &input, inputs.labels.as_ref(), &tables);
                (graph.output.without_graph(), Some(graph))
            };
            kept.push(Kept { input: input.clone(), graph });
            if let Output::Hidden(hidden) = &output {
                input = Input::Hidden(hidden.clone());
            }
            last = Some(output);
        }
        let answer =
            last.map_or_else(|| Ok(Vec::new()), |output| self.answer("forward", output, inputs.shape))?;
        self.live.insert(micro_batch, MicroBatch { shape: inputs.shape, labels: inputs.labels, kept });
        Ok(Edge::new(answer))
    }

    pub(crate) fn backward(
        &mut self,
        micro_batch: u32,
        mut gradients: Edge,
        mut ready: Option<&mut GradientReady<'_>>,
    ) -> Result<Edge> {
        let batch = self
            .live
            .remove(&micro_batch)
            .ok_or_else(|| failed("backward", format!("micro-batch {micro_batch} is not in flight")))?;
        let [b, s] = batch.shape;
        let mut gradient = None;
        if !self.has_head() {
            let missing = || Error::Answer { engine: NAME.into(), operation: "backward", missing: "hidden" };
            let lease = gradients.take("hidden").ok_or_else(missing)?;
            gradient = Some(self.hidden("backward", &lease, b * s)?);
        }
        let tables = self.tables(s);
        let mut kept = batch.kept;
        for at in (0..self.layers.len()).rev() {
            let layer = &self.layers[at];
            let Some(Kept { input, graph }) = kept.pop() else { break };
            let graph = graph.unwrap_or_else(|| self.graph(layer, &input, batch.labels.as_ref(), &tables));
            let (names, leaf) = (layer.names.clone(), graph.leaf);
            let mut found = match (graph.output, gradient.take()) {
                (Output::Loss(loss), _) => loss.backward(),
                (Output::Hidden(hidden), Some(gradient)) => (hidden * gradient).sum().backward(),
                (Output::Hidden(_), None) => return Err(failed("backward", "an output has no gradient")),
            };
            gradient = leaf.and_then(|leaf| leaf.grad_remove(&mut found));
            for name in names {
                if let Some(new) = self.parameters[&name].grad_remove(&mut found) {
                    let sum = match self.gradients.remove(&name) {
                        Some(sum) => sum + new,
                        None => new,
                    };
                    self.gradients.insert(name, sum);
                }
            }
            if let Some(ready) = ready.as_deref_mut() {
                let layer = &self.layers[at];
                ready(layer.index, self.final_gradients(layer)?)?;
            }
        }
        if let Some(gradient) = gradient {
            return Ok(Edge::new(self.answer("backward", Output::Hidden(gradient), [b, s])?));
        }
        // Nothing is read, so nothing has waited: this call would be measured too short, and the next
        // one too long.
        self.device.sync().map_err(|error| failed("backward", error.to_string()))?;
        Ok(Edge::default())
    }

    /// Forward without a graph; with `to_logits` the head answers with them and takes no labels.
    pub(crate) fn evaluate(&mut self, operation: &'static str, edge: Edge, to_logits: bool) -> Result<Edge> {
        let inputs = self.inputs(operation, edge, self.has_head() && !to_logits)?;
        let tables = self.tables(inputs.shape[1]);
        let mut input = inputs.input;
        for layer in &self.layers {
            if layer.kind == LayerKind::Head && to_logits {
                let Input::Hidden(x) = input else { break };
                let logits = model::logits(&self.model, &self.weights(layer, false), x);
                let [b, s] = inputs.shape.map(|n| n as u64);
                let shape = vec![b, s, u64::from(self.model.vocab_size)];
                return Ok(Edge::new(read(operation, vec![("logits".into(), shape, logits)])?));
            }
            match self.infer(layer, input, inputs.labels.as_ref(), &tables) {
                Output::Hidden(hidden) => input = Input::Hidden(hidden),
                loss @ Output::Loss(_) => {
                    return Ok(Edge::new(self.answer(operation, loss, inputs.shape)?));
                }
            }
        }
        match input {
            Input::Hidden(hidden) => {
                Ok(Edge::new(self.answer(operation, Output::Hidden(hidden), inputs.shape)?))
            }
            Input::Ids(_) => Ok(Edge::default()),
        }
    }

    pub(crate) fn has_head(&self) -> bool {
        self.layers.last().is_some_and(|layer| layer.kind == LayerKind::Head)
    }

    pub(crate) fn has_embedding(&self) -> bool {
        self.layers.first().is_some_and(|layer| layer.kind == LayerKind::Embedding)
    }

    pub(crate) fn hidden_size(&self) -> u64 {
        u64::from(self.model.hidden_size)
    }

    fn final_gradients(&self, layer: &Layer) -> Result<Vec<Lease>> {
        let named = layer.last_of.iter().map(|name| {
            let spec = &self.tensors[name];
            let gradient = self.gradients.get(name).cloned();
            let gradient = gradient.unwrap_or_else(|| Tensor::zeros(dims(spec), &self.device));
            (name.clone(), spec.shape.clone(), gradient)
        });
        read("backward", named.collect())
    }

    fn graph(&self, layer: &Layer, input: &Input, labels: Option<&Tensor<1, Int>>, tables: &Tables) -> Graph {
        let weights = self.weights(layer, true);
        match input {
            Input::Ids(ids) => {
                let output = Output::Hidden(model::embedding(weights[0].clone(), ids.clone()));
                Graph { leaf: None, output }
            }
            Input::Hidden(x) => {
                let leaf = leaf(x.clone());
                let output = self.layer(layer, &weights, leaf.clone(), labels, tables);
                Graph { leaf: Some(leaf), output }
            }
        }
    }

    fn infer(&self, layer: &Layer, input: Input, labels: Option<&Tensor<1, Int>>, tables: &Tables) -> Output {
        let weights = self.weights(layer, false);
        match input {
            Input::Ids(ids) => Output::Hidden(model::embedding(weights[0].clone(), ids)),
            Input::Hidden(x) => self.layer(layer, &weights, x, labels, tables),
        }
    }

    fn layer(
        &self,
        layer: &Layer,
        weights: &[Tensor<2>],
        x: Tensor<2>,
        labels: Option<&Tensor<1, Int>>,
        tables: &Tables,
    ) -> Output {
        match (layer.kind, labels) {
            (LayerKind::Head, Some(labels)) => {
                Output::Loss(model::loss_sum(model::logits(&self.model, weights, x), labels.clone()))
            }
            _ => Output::Hidden(model::block(&self.model, weights, x, tables)),
        }
    }

    fn weights(&self, layer: &Layer, tracked: bool) -> Vec<Tensor<2>> {
        let of = |name: &String| {
            let weight = self.parameters[name].clone();
            if tracked { weight } else { weight.inner() }
        };
        layer.names.iter().map(of).collect()
    }

    fn tables(&mut self, length: usize) -> Tables {
        let (model, device) = (&self.model, &self.device);
        self.tables.entry(length).or_insert_with(|| Tables::new(model, length, device)).clone()
    }

    fn spec(&self, operation: &'static str, name: &str) -> Result<&TensorSpec> {
        self.tensors.get(name).ok_or_else(|| failed(operation, format!("the stage has no tensor {name}")))
    }

    fn inputs(&self, operation: &'static str, mut edge: Edge, with_labels: bool) -> Result<Inputs> {
        if edge.first_position != 0 {
            return Err(failed(operation, "only whole sequences are supported yet"));
        }
        let mut take = |name: &'static str| {
            edge.take(name).ok_or(Error::Answer { engine: NAME.into(), operation, missing: name })
        };
        let (shape, input) = if self.has_embedding() {
            let lease = take("input_ids")?;
            let (shape, ids) = self.tokens(operation, &lease)?;
            (shape, Input::Ids(ids))
        } else {
            let lease = take("hidden")?;
            let [b, s, _] = lease.shape[..] else {
                return Err(failed(operation, format!("{lease:?} must have three dimensions")));
            };
            let shape = [b as usize, s as usize];
            (shape, Input::Hidden(self.hidden(operation, &lease, shape[0] * shape[1])?))
        };
        let labels = if with_labels {
            let (labels_shape, labels) = self.tokens(operation, &take("labels")?)?;
            if labels_shape != shape {
                return Err(failed(operation, format!("labels are {labels_shape:?}, inputs {shape:?}")));
            }
            Some(labels)
        } else {
            None
        };
        self.fits(shape).map_err(|message| failed(operation, message))?;
        Ok(Inputs { shape, input, labels })
    }

    /// Whether the adapter binds the largest tensor of a micro-batch.
    fn fits(&self, [b, s]: [usize; 2]) -> std::result::Result<(), String> {
        let (b, s, m) = (b as u64, s as u64, &self.model);
        let widest = |layer: &Layer| match layer.kind {
            LayerKind::Embedding => ("hidden states", m.hidden_size.into()),
            LayerKind::Block => {
                let (scores, gated) = (u64::from(m.num_heads) * s, m.intermediate_size.into());
                if scores < gated { ("gated values", gated) } else { ("attention scores", scores) }
            }
            LayerKind::Head => ("logits", m.vocab_size.into()),
        };
        let widest = self.layers.iter().map(widest).max_by_key(|(_, a_token)| *a_token);
        widest.map_or(Ok(()), |(what, a_token)| {
            let name = format!("{what} of {b} samples of {s} tokens");
            binds(&name, 4 * b * s * a_token, self.largest_tensor_bytes)
        })
    }

    /// `[b, s, d]` as `[rows, d]` on the device.
    fn hidden(&self, operation: &'static str, lease: &Lease, rows: usize) -> Result<Tensor<2>> {
        let values = f32_values(lease)?;
        let width = self.model.hidden_size as usize;
        if rows == 0 || values.len() != rows * width || lease.shape.last() != Some(&(width as u64)) {
            return Err(failed(operation, format!("{lease:?} does not fit the model")));
        }
        Ok(Tensor::from_data(TensorData::new(values, [rows, width]), &self.device))
    }

    fn tokens(&self, operation: &'static str, lease: &Lease) -> Result<([usize; 2], Tensor<1, Int>)> {
        let vocab = self.model.vocab_size;
        let [b, s] = lease.shape[..] else {
            return Err(failed(operation, format!("{lease:?} must have two dimensions")));
        };
        let tokens = elements(lease, DType::I32, i32::from_le_bytes)?;
        if let Some(token) = tokens.iter().find(|token| **token < 0 || **token as u32 >= vocab) {
            return Err(failed(operation, format!("{}: token {token} is not below {vocab}", lease.name)));
        }
        let count = tokens.len();
        if s == 0 || count as u64 != b * s {
            return Err(failed(operation, format!("{lease:?} holds {count} tokens")));
        }
        let tokens = Tensor::from_data(TensorData::new(tokens, [count]), &self.device);
        Ok(([b as usize, s as usize], tokens))
    }

    fn answer(&self, operation: &'static str, output: Output, [b, s]: [usize; 2]) -> Result<Vec<Lease>> {
        match output {
            Output::Loss(loss) => read(operation, vec![("loss_sum".into(), vec![1], loss.reshape([1, 1]))]),
            Output::Hidden(hidden) => {
                let shape = vec![b as u64, s as u64, self.hidden_size()];
                read(operation, vec![("hidden".into(), shape, hidden)])
            }
        }
    }
}

impl Output {
    fn without_graph(&self) -> Self {
        match self {
            Self::Hidden(hidden) => Self::Hidden(hidden.clone().inner()),
            Self::Loss(loss) => Self::Loss(loss.clone().inner()),
        }
    }
}

/// An error that names a tensor, if it takes more than an adapter binds at once.
fn binds(name: &str, bytes: u64, largest: u64) -> std::result::Result<(), String> {
    if bytes > largest {
        return Err(format!("{name} take {bytes} bytes, but this adapter binds at most {largest}"));
    }
    Ok(())
}

fn leaf(tensor: Tensor<2>) -> Tensor<2> {
    tensor.autodiff().require_grad()
}

/// Rows and columns of a tensor on the device.
pub(crate) fn dims(spec: &TensorSpec) -> [usize; 2] {
    match spec.shape[..] {
        [rows, columns] => [rows as usize, columns as usize],
        _ => [1, spec.num_elements() as usize],
    }
}

/// Reads tensors in one sync; the leases own what was read.
fn read(operation: &'static str, named: Vec<(String, Vec<u64>, Tensor<2>)>) -> Result<Vec<Lease>> {
    if named.is_empty() {
        return Ok(Vec::new());
    }
    let mut reading = Transaction::default();
    let mut labels = Vec::new();
    for (name, shape, tensor) in named {
        reading = reading.register(tensor);
        labels.push((name, shape));
    }
    let read = reading.try_execute().map_err(|error| failed(operation, error.to_string()))?;
    let leases = labels.into_iter().zip(read);
    Ok(leases.map(|((name, shape), data)| Lease::of_bytes(name, DType::F32, shape, Host(data))).collect())
}

/// What was read, where the driver put it.
struct Host(TensorData);

impl AsRef<[u8]> for Host {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

/// Values of an f32 lease of any alignment.
fn f32_values(lease: &Lease) -> Result<Vec<f32>> {
    match lease.as_f32() {
        Ok(values) => Ok(values.to_vec()),
        Err(_) => elements(lease, DType::F32, f32::from_le_bytes),
    }
}

fn elements<T>(lease: &Lease, dtype: DType, of: fn([u8; 4]) -> T) -> Result<Vec<T>> {
    let (elements, rest) = lease.bytes().as_chunks::<4>();
    if lease.dtype != dtype || !rest.is_empty() {
        return Err(Error::Lease { name: lease.name.clone(), found: lease.dtype, expected: dtype });
    }
    Ok(elements.iter().map(|bytes| of(*bytes)).collect())
}
