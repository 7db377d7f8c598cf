//! Time and memory of each kind of layer, through the engine interface.

use std::time::{Duration, Instant};

use hgct_core::init;
use hgct_core::model::{LayerKind, ModelSpec, TensorSpec};
use hgct_core::plan::StageId;
use hgct_core::profile::{LayerProfile, Spread};

use crate::engine::{BackwardPart, Edge, Engine, ImportRows, Lease, StageLoad};
use crate::memory::{begin_peak, give_back, peak_bytes, resident_bytes};
use crate::{Error, Result};

use super::{MICRO_BATCHES, Request, mean_ns, median};

/// Windows of one layer at one size, at least: enough for a median.
const MIN_WINDOWS: usize = 3;

/// Micro-batches in flight at most, when memory is measured. The first half fills what earlier
/// measurements left free.
const IN_FLIGHT: u32 = 4;

/// Figures of the engine's part.
pub(super) struct Measured {
    pub(super) layers: Vec<LayerProfile>,
    pub(super) import_ps_per_byte: u64,
    pub(super) action_overhead_ns: u64,
    /// Parameters and gradients of all probes.
    pub(super) parameter_bytes: u64,
}

/// One kind of layer as a stage of its own.
struct Probe {
    kind: LayerKind,
    stage: StageId,
    first_layer: u32,
    num_layers: u32,
}

/// Windows of one probe at one size.
struct Sample {
    /// Index among the probes.
    probe: usize,
    kind: LayerKind,
    num_layers: u32,
    micro_batch: u32,
    /// What a forward and its backward took when all was compiled.
    pair: Duration,
    forward_ns: Vec<u64>,
    backward_ns: Vec<u64>,
    activation_bytes: u64,
    workspace_bytes: u64,
}

/// Measures within the time until `end`.
pub(super) fn measure(
    engine: &mut dyn Engine,
    request: &Request,
    end: Instant,
    window: Duration,
) -> Result<Measured> {
    let model = ModelSpec { num_layers: request.model.num_layers.clamp(1, 2), ..request.model.clone() };
    let probes = probes(&model);
    let import_ps_per_byte = load(engine, &model, &probes, window)?;

    let timer =
        |probe, micro_batch| Timer { model: &model, probe, micro_batch, seq_len: request.seq_len, end };
    let mut left_out = None;
    // Memory first, smallest size first: what a head or a larger size frees would hide it. Half of the
    // time is kept for the windows of the smallest.
    let mut fitting: Vec<(u32, u64)> = Vec::new();
    let half = end.checked_sub(request.budget / 2).unwrap_or(end);
    let mut each = Duration::ZERO;
    for micro_batch in sizes(request) {
        let start = Instant::now();
        if !fitting.is_empty() && start + each * micro_batch > half {
            break;
        }
        match timer(&probes[BLOCK], micro_batch).activation_bytes(engine) {
            Ok(bytes) => fitting.push((micro_batch, bytes)),
            Err(error) => {
                left_out = Some(error);
                break;
            }
        }
        each = start.elapsed() / micro_batch;
    }
    let mut samples: Vec<Sample> = Vec::new();
    for (micro_batch, block_bytes) in fitting {
        engine.abort()?;
        let of_size: Result<Vec<Sample>> =
            probes.iter().map(|probe| timer(probe, micro_batch).warm_up(engine, block_bytes)).collect();
        match of_size {
            // A size that leaves no time for the fewest windows would take it from smaller ones.
            Ok(of_size) => {
                let all = || samples.iter().chain(&of_size);
                let needed: Duration = all().map(|sample| sample.pair.max(window)).sum();
                if !samples.is_empty() && Instant::now() + needed * MIN_WINDOWS as u32 > end {
                    break;
                }
                samples.extend(of_size);
            }
            Err(error) => {
                left_out = Some(error);
                break;
            }
        }
    }
    // Layers and sizes take turns, and every device goes on for the same time: what the others and
    // the host do meanwhile is then in all figures alike. A quarter is kept for slow rounds.
    let last_round = end.checked_sub(request.budget / 4).unwrap_or(end);
    let mut round = Duration::ZERO;
    while samples
        .first()
        .is_some_and(|first| first.forward_ns.len() < MIN_WINDOWS || Instant::now() + round < last_round)
    {
        let start = Instant::now();
        let mut turn = |sample: &mut Sample| {
            let timed = timer(&probes[sample.probe], sample.micro_batch).window(engine, window);
            let (forward, backward) = timed.map_err(|error| (sample.micro_batch, error))?;
            sample.forward_ns.push(forward);
            sample.backward_ns.push(backward);
            Ok(())
        };
        if let Err((micro_batch, error)) = samples.iter_mut().try_for_each(&mut turn) {
            // A larger size would not be held or reached either.
            samples.retain(|sample| sample.micro_batch < micro_batch);
            left_out = Some(error);
            break;
        }
        round = start.elapsed();
    }
    engine.abort()?;
    let all = model.tensors();
    let parameter_bytes = 2 * 4 * all.iter().map(TensorSpec::num_elements).sum::<u64>();
    let overhead = action_overhead_ns(&samples);
    let layers: Vec<LayerProfile> = samples.iter().filter_map(|sample| sample.row(overhead)).collect();
    match left_out {
        Some(error) if layers.is_empty() => Err(error),
        _ => Ok(Measured { layers, import_ps_per_byte, action_overhead_ns: overhead, parameter_bytes }),
    }
}

/// The sizes that were asked for, ascending: memory of a larger one then exceeds what a smaller
/// one left free.
fn sizes(request: &Request) -> Vec<u32> {
    let mut sizes = request.micro_batches.clone();
    sizes.retain(|size| *size > 0);
    sizes.sort_unstable();
    sizes.dedup();
    if sizes.is_empty() { MICRO_BATCHES.to_vec() } else { sizes }
}

/// Kinds of layer, each a probe.
pub(super) const NUM_KINDS: u64 = 3;

/// Index of the block among the probes.
const BLOCK: usize = 1;

fn probes(model: &ModelSpec) -> [Probe; 3] {
    let probe =
        |stage, kind, first_layer, num_layers| Probe { kind, stage: StageId(stage), first_layer, num_layers };
    [
        probe(0, LayerKind::Embedding, 0, 1),
        probe(1, LayerKind::Block, 1, model.num_layers),
        probe(2, LayerKind::Head, model.head_layer(), 1),
    ]
}

/// Loads all probes at once and fills their parameters; answers with picoseconds a byte of import.
fn load(engine: &mut dyn Engine, model: &ModelSpec, probes: &[Probe], window: Duration) -> Result<u64> {
    let stages: Vec<StageLoad> = probes
        .iter()
        .map(|probe| StageLoad {
            stage: probe.stage,
            model: model.clone(),
            layers: probe.first_layer..probe.first_layer + probe.num_layers,
            recompute: false,
        })
        .collect();
    engine.load(&stages)?;
    let mut import_ps_per_byte = 0;
    for (probe, stage) in probes.iter().zip(&stages) {
        let tensors = model.stage_tensors(stage.layers.clone());
        let rows: Vec<ImportRows> = tensors
            .iter()
            .map(|(_, tensor)| ImportRows { lease: parameter(model, tensor), first_row: 0 })
            .collect();
        engine.import(probe.stage, &rows)?;
        if probe.kind == LayerKind::Block {
            let bytes: u64 = tensors.iter().map(|(_, tensor)| 4 * tensor.num_elements()).sum();
            let mut done = Ok(());
            let mut once = || {
                if done.is_ok() {
                    done = engine.import(probe.stage, &rows);
                }
            };
            let ns = median((0..3).map(|_| mean_ns(window, &mut once)).collect());
            done?;
            import_ps_per_byte = (ns * 1000).div_ceil(bytes.max(1));
        }
        engine.zero_gradients(probe.stage)?;
    }
    Ok(import_ps_per_byte)
}

/// Whether the engine computes in this process's own memory.
fn on_host(engine: &dyn Engine) -> bool {
    engine.describe().device.to_lowercase().contains("cpu")
}

/// Parameters of the right size: a tile of initial values over and over, since making each
/// element of a large embedding takes longer than all measurements.
fn parameter(model: &ModelSpec, tensor: &TensorSpec) -> Lease {
    const TILE: u64 = 65_537;
    let count = tensor.num_elements();
    let mut tile = vec![0.0; count.min(TILE) as usize];
    init::fill(model, 0, tensor, 0, &mut tile);
    let values = tile.iter().copied().cycle().take(count as usize).collect();
    Lease::of_f32(&tensor.name, tensor.shape.clone(), values)
}

/// The least that an embedding's forward took in any window of the smallest size.
fn action_overhead_ns(samples: &[Sample]) -> u64 {
    let smallest = samples.iter().find(|sample| sample.kind == LayerKind::Embedding);
    smallest.and_then(|sample| sample.forward_ns.iter().copied().min()).unwrap_or(0)
}

impl Sample {
    /// The profile's row: one layer, without the overhead of an action.
    fn row(&self, overhead_ns: u64) -> Option<LayerProfile> {
        let of_layer = |windows: &[u64]| {
            let layers = u64::from(self.num_layers);
            Spread::of(windows.iter().map(|ns| ns.saturating_sub(overhead_ns) / layers).collect())
        };
        Some(LayerProfile {
            layer: self.kind,
            micro_batch: self.micro_batch,
            forward: of_layer(&self.forward_ns)?,
            backward: of_layer(&self.backward_ns)?,
            activation_bytes: self.activation_bytes,
            workspace_bytes: self.workspace_bytes,
        })
    }
}

/// Times one probe at one size.
struct Timer<'a> {
    model: &'a ModelSpec,
    probe: &'a Probe,
    micro_batch: u32,
    seq_len: u32,
    end: Instant,
}

impl Timer<'_> {
    /// Warms up, which compiles, and looks at memory.
    fn warm_up(&self, engine: &mut dyn Engine, block_bytes: u64) -> Result<Sample> {
        self.pair(engine)?;
        let activation_bytes =
            if self.probe.kind == LayerKind::Block { block_bytes } else { self.counted_activation_bytes() };
        let workspace_bytes = self.workspace_bytes(engine, activation_bytes)?;
        let (forward, backward) = self.pair(engine)?;
        Ok(Sample {
            probe: self.probe.stage.0 as usize,
            kind: self.probe.kind,
            num_layers: self.probe.num_layers,
            micro_batch: self.micro_batch,
            pair: forward + backward,
            forward_ns: Vec::new(),
            backward_ns: Vec::new(),
            activation_bytes,
            workspace_bytes,
        })
    }

    /// Mean nanoseconds of a forward and of a backward, over pairs until `window` is over.
    fn window(&self, engine: &mut dyn Engine, window: Duration) -> Result<(u64, u64)> {
        let (mut forward, mut backward, mut count) = (Duration::ZERO, Duration::ZERO, 0);
        while forward + backward < window {
            let (f, b) = self.pair(engine)?;
            forward += f;
            backward += b;
            count += 1;
        }
        let mean = |time: Duration| time.as_nanos() as u64 / count;
        Ok((mean(forward), mean(backward)))
    }

    /// One forward and its backward.
    fn pair(&self, engine: &mut dyn Engine) -> Result<(Duration, Duration)> {
        if Instant::now() > self.end {
            return Err(Error::Engine {
                engine: engine.describe().engine.clone(),
                operation: "profile",
                message: format!("micro-batches of {} are not reached within the budget", self.micro_batch),
            });
        }
        let (inputs, seed) = (self.inputs(), self.seed());
        let start = Instant::now();
        let output = engine.forward(self.probe.stage, 0, inputs)?.wait(self.end)?;
        let forward = start.elapsed();
        drop(output);
        let start = Instant::now();
        drop(engine.backward(self.probe.stage, 0, BackwardPart::Full, seed, None)?.wait(self.end)?);
        Ok((forward, start.elapsed()))
    }

    /// Bytes of one block that a micro-batch in flight keeps alive.
    fn activation_bytes(&self, engine: &mut dyn Engine) -> Result<u64> {
        self.pair(engine)?;
        give_back();
        let mut resident = Vec::new();
        for number in 0..IN_FLIGHT {
            drop(engine.forward(self.probe.stage, number, self.inputs())?.wait(self.end)?);
            resident.push(engine.tensor_bytes().unwrap_or_else(resident_bytes));
        }
        let is_counted = engine.tensor_bytes().is_some();
        engine.abort()?;
        let half = resident.len() / 2;
        let grown = resident[2 * half - 1].saturating_sub(resident[half - 1]);
        let measured = grown / half as u64 / u64::from(self.probe.num_layers);
        let counted = self.counted_activation_bytes();
        let [samples, tokens] = [self.micro_batch, self.seq_len].map(u64::from);
        let input = 4 * samples * tokens * u64::from(self.model.hidden_size);
        let is_plausible = is_counted || on_host(engine) && measured <= 4 * counted;
        Ok(if is_plausible { measured.max(input) } else { counted })
    }

    /// Bytes that one layer takes while it is computed, beside what a micro-batch in flight keeps.
    fn workspace_bytes(&self, engine: &mut dyn Engine, activation_bytes: u64) -> Result<u64> {
        if !on_host(engine) {
            // As much again for the gradients of what is kept.
            return Ok(self.counted_activation_bytes());
        }
        give_back();
        let before = resident_bytes();
        begin_peak();
        self.pair(engine)?;
        let kept = activation_bytes * u64::from(self.probe.num_layers);
        Ok(peak_bytes().saturating_sub(before + kept))
    }

    /// Bytes that backward of one layer needs of its forward, in f32: inputs of every product,
    /// norm and gate, the attention weights, and the head's logits.
    fn counted_activation_bytes(&self) -> u64 {
        let m = self.model;
        let [d, f, v] = [m.hidden_size, m.intermediate_size, m.vocab_size].map(u64::from);
        let [q, kv] = [m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim].map(u64::from);
        let [samples, tokens] = [self.micro_batch, self.seq_len].map(u64::from);
        let a_token = match self.probe.kind {
            LayerKind::Embedding => 1,
            LayerKind::Block => 4 * d + 2 * q + 2 * kv + 3 * f + u64::from(m.num_heads) * tokens,
            LayerKind::Head => 2 * d + v,
        };
        4 * a_token * samples * tokens
    }

    fn inputs(&self) -> Edge {
        match self.probe.kind {
            LayerKind::Embedding => Edge::new(vec![self.tokens("input_ids")]),
            LayerKind::Block => Edge::new(vec![self.hidden()]),
            LayerKind::Head => Edge::new(vec![self.hidden(), self.tokens("labels")]),
        }
    }

    fn seed(&self) -> Edge {
        let head = self.probe.kind == LayerKind::Head;
        Edge::new(if head { Vec::new() } else { vec![self.hidden()] })
    }

    fn tokens(&self, name: &str) -> Lease {
        let count = self.micro_batch * self.seq_len;
        let vocab = self.model.vocab_size;
        // A stride through the vocabulary: not one row over and over from a cache.
        let ids = (0..count).map(|i| (u64::from(i) * 7919 % u64::from(vocab)) as i32).collect();
        Lease::of_i32(name, self.shape(), ids)
    }

    fn hidden(&self) -> Lease {
        let shape = [self.shape(), vec![u64::from(self.model.hidden_size)]].concat();
        let count: u64 = shape.iter().product();
        let values = (0..count).map(|i| ((i * 31 % 199) as f32 - 99.0) / 57.0).collect();
        Lease::of_f32("hidden", shape, values)
    }

    fn shape(&self) -> Vec<u64> {
        vec![u64::from(self.micro_batch), u64::from(self.seq_len)]
    }
}
