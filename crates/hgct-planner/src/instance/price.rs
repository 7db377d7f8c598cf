//! What a layout costs: the reference that every faster evaluation must agree with.
//!
//! With m micro-batches, and for every stage compute c and transfer t a micro-batch, a 1F1B pipeline
//! takes `Σ c + Σ t + (m − 1) · max(c + t)` (with transfers beside compute, `max(max(c, t))`). The
//! step is the slowest pipeline, the largest update, and the largest exchange of any device.

use serde::{Deserialize, Serialize};

use super::schedule::Work;
use super::{CostRow, Exchange, Held, Instance, Layout, Stage, Template, Transfer, Update};

mod overlap;

pub(crate) use overlap::Buckets;

/// What a layout costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Priced {
    /// One step: slowest pipeline, update, exchange.
    pub iteration_s: f64,
    /// The slowest pipeline, without update and exchange.
    pub pipeline_s: f64,
    /// The largest update.
    pub update_s: f64,
    /// The largest exchange of any device that does not hide behind compute.
    pub exchange_s: f64,
    /// The same before anything hides.
    pub exchange_whole_s: f64,
    /// A row a template.
    pub templates: Vec<PricedTemplate>,
}

/// What a pipeline of a template costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PricedTemplate {
    /// The pipeline: the three below.
    pub total_s: f64,
    /// Micro-batches of its slowest stage, compute only.
    pub compute_s: f64,
    /// What transfers add to these.
    pub transfer_s: f64,
    /// Fill and drain.
    pub bubble_s: f64,
    /// A row a stage.
    pub stages: Vec<PricedStage>,
}

/// What a stage costs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PricedStage {
    /// Forward of one micro-batch.
    pub forward_s: f64,
    /// Backward of one micro-batch, recompute included.
    pub backward_s: f64,
    /// Handing one micro-batch on.
    pub transfer_s: f64,
    /// Update of its layers, as the rules count it.
    pub update_s: f64,
    /// Exchange of its layers' gradients, before anything hides.
    pub exchange_s: f64,
    /// What of it shows.
    pub exposed_s: f64,
    /// Part of the step in which its devices compute.
    pub busy: f64,
    /// Peak of each device.
    pub memory_bytes: f64,
    /// Micro-batches whose activations it holds.
    pub in_flight: f64,
}

/// Prices a layout whose stages are sound: [`super::check`] says whether it is. Costs that are not
/// known make everything infinite. The sums run in the order of templates, stages and layers.
pub fn price(instance: &Instance, layout: &Layout) -> Priced {
    let pricer = Pricer::new(instance, layout);
    let mut templates: Vec<PricedTemplate> = layout.templates.iter().map(|t| pricer.template(t)).collect();
    pricer.exchange(&mut templates);
    let most =
        |of: fn(&PricedStage) -> f64| templates.iter().flat_map(|t| &t.stages).map(of).fold(0.0, f64::max);
    let (update_s, exchange_s) = (most(|s| s.update_s), most(|s| s.exposed_s));
    let exchange_whole_s = most(|s| s.exchange_s);
    let pipeline_s = templates.iter().map(|t| t.total_s).fold(0.0, f64::max);
    let iteration_s = pipeline_s + update_s + exchange_s;
    for (template, of_layout) in templates.iter_mut().zip(&layout.templates) {
        for stage in &mut template.stages {
            let num = f64::from(of_layout.num_micro_batches);
            stage.busy = num * (stage.forward_s + stage.backward_s) / iteration_s;
        }
    }
    Priced { iteration_s, pipeline_s, update_s, exchange_s, exchange_whole_s, templates }
}

struct Pricer<'a> {
    instance: &'a Instance,
    layout: &'a Layout,
    /// Class of every layer.
    classes: Vec<usize>,
    /// Copies of each layer; all pipelines hold all layers, but stages may have several replicas, and
    /// several tensor-parallel groups each.
    owners: Vec<f64>,
    /// Copies of each layer's routed experts.
    expert_owners: Vec<f64>,
}

impl<'a> Pricer<'a> {
    fn new(instance: &'a Instance, layout: &'a Layout) -> Self {
        let classes = instance.layer_classes();
        let mut owners = vec![0.0; classes.len()];
        let mut expert_owners = owners.clone();
        for template in &layout.templates {
            for stage in &template.stages {
                let num = f64::from(template.count) * f64::from(stage.replicas);
                let parts = f64::from(stage.parts());
                for of_layer in layers_of(&mut owners, stage) {
                    *of_layer += num * parts;
                }
                for of_layer in layers_of(&mut expert_owners, stage) {
                    *of_layer += num;
                }
            }
        }
        Self { instance, layout, classes, owners, expert_owners }
    }

    fn template(&self, template: &Template) -> PricedTemplate {
        let num = template.stages.len();
        let stages: Vec<PricedStage> = (0..num).map(|at| self.stage(template, at)).collect();
        let pace = |s: &PricedStage| {
            let compute = s.forward_s + s.backward_s;
            match self.instance.rules.transfer {
                Transfer::Published | Transfer::Serial => compute + s.transfer_s,
                Transfer::Overlapped => compute.max(s.transfer_s),
            }
        };
        let slowest =
            (0..num).fold(0, |at, other| if pace(&stages[other]) > pace(&stages[at]) { other } else { at });
        let micro_batches = f64::from(template.num_micro_batches);
        let (mut compute_s, mut transfer_s, mut bubble_s) = (0.0, 0.0, 0.0);
        for (at, stage) in stages.iter().enumerate() {
            if at == slowest {
                let own = stage.forward_s + stage.backward_s;
                compute_s = micro_batches * own;
                transfer_s = own + stage.transfer_s - pace(stage) + micro_batches * (pace(stage) - own);
            } else {
                bubble_s += template.schedule.fill_s(work(stage, &template.stages[at]));
            }
        }
        PricedTemplate { total_s: compute_s + transfer_s + bubble_s, compute_s, transfer_s, bubble_s, stages }
    }

    fn cost(&self, template: &Template, stage: &Stage) -> Option<&CostRow> {
        let micro_batch = template.micro_batch / (stage.replicas * stage.parts()).max(1);
        let pool = &self.instance.pools[stage.pool];
        pool.cost_with_experts(stage.tensor_parallel, stage.expert_parallel, micro_batch)
    }

    fn stage(&self, template: &Template, at: usize) -> PricedStage {
        let stage = &template.stages[at];
        let instance = self.instance;
        let cost = self.cost(template, stage);
        let (Some(cost), Some(degree)) = (cost, instance.degree_index(stage.tensor_parallel)) else {
            return UNKNOWN;
        };
        let scheduled = template.schedule.in_flight(template.stages.len(), at);
        let in_flight = scheduled.min(instance.most_in_flight(template.micro_batch));
        let samples = f64::from(cost.micro_batch);
        let overhead = instance.overhead_bytes(stage.pool, stage.group_devices());
        let (mut forward_s, mut backward_s, mut update_s) = (0.0, 0.0, 0.0);
        let (mut held, mut kept, mut working) = (0.0, 0.0, 0.0f64);
        let layers = stage.first_layer as usize..stage.end_layer as usize;
        for layer in layers.clone() {
            let class = &self.classes[layer];
            let memory = &instance.classes[*class].memory[degree];
            let of = Held::new(instance, *class, degree, stage.parts());
            let (shards, expert_shards) = if self.layout.shard_optimizer {
                (self.owners[layer], self.expert_owners[layer])
            } else {
                (1.0, 1.0)
            };
            forward_s += cost.forward_s[*class];
            backward_s += cost.backward_s[*class];
            held += of.bytes(shards, expert_shards);
            if stage.recompute {
                backward_s += cost.forward_s[*class];
                kept += memory.recompute_bytes;
                working = working.max(memory.activation_bytes);
            } else {
                kept += memory.activation_bytes;
            }
            update_s += match instance.rules.update {
                Update::FirstLayer => 0.0,
                Update::AllLayers => of.update_s(cost.update_s[*class], memory, shards, expert_shards),
            };
        }
        if instance.rules.update == Update::FirstLayer {
            update_s = cost.update_s[self.classes[layers.start]];
        }
        PricedStage {
            forward_s,
            backward_s,
            transfer_s: self.transfer_s(template, at),
            update_s,
            exchange_s: 0.0,
            exposed_s: 0.0,
            busy: 0.0,
            memory_bytes: held + samples * (in_flight * kept + working) + overhead,
            in_flight,
        }
    }

    /// Activation to the next stage and gradient to the previous one, of one micro-batch.
    fn transfer_s(&self, template: &Template, at: usize) -> f64 {
        let stages = &template.stages;
        let (stage, last) = (&stages[at], stages.len() - 1);
        let devices = |stage: &Stage| {
            stage.num_devices().min(u64::from(self.instance.pools[stage.pool].devices_per_node)) as u32
        };
        let to = |other: &Stage, layer: u32| {
            let output = self.instance.classes[self.classes[layer as usize]].output_bytes;
            let bytes = output * f64::from(template.micro_batch);
            self.instance.inter[stage.pool][other.pool].seconds(devices(stage), devices(other), bytes)
        };
        let mut activation = if at < last { to(&stages[at + 1], stage.end_layer - 1) } else { 0.0 };
        let mut gradient = if at > 0 { to(&stages[at - 1], stage.first_layer - 1) } else { 0.0 };
        if self.instance.rules.transfer == Transfer::Published {
            if at == 0 && stages.len() > 3 {
                activation *= 2.0;
            }
            if at == last {
                gradient *= 2.0;
            }
        }
        (activation + gradient) * template.schedule.transfers()
    }

    /// Exchange of the layers of every stage. Layers between the same cuts of all templates have the
    /// same holders and travel as one group; a device pays for all groups that it holds.
    fn exchange(&self, templates: &mut [PricedTemplate]) {
        let groups = self.exchange_groups();
        let buckets = Buckets::of_groups(self, &groups);
        for (t, (template, of_layout)) in templates.iter_mut().zip(&self.layout.templates).enumerate() {
            for (s, (stage, of_stage)) in template.stages.iter_mut().zip(&of_layout.stages).enumerate() {
                let layers = of_stage.first_layer..of_stage.end_layer;
                stage.exchange_s =
                    groups.iter().filter(|(of, _)| layers.contains(&of.start)).map(|(_, s)| s).sum();
                let pass_s = of_layout.schedule.last_pass_s(work(stage, of_stage));
                let hides_s = self.instance.rules.exchange_overlap * pass_s;
                stage.exposed_s = buckets.exposed_s((t, s), layers, stage.exchange_s, hides_s);
            }
        }
    }

    /// Layers that travel together, first to last, with the seconds of their exchange: all layers
    /// between neighbouring cuts of any template have the same holders.
    fn exchange_groups(&self) -> Vec<(std::ops::Range<u32>, f64)> {
        let stages = self.layout.templates.iter().flat_map(|t| &t.stages);
        let mut cuts: Vec<u32> = stages.map(|s| s.first_layer).collect();
        cuts.push(self.classes.len() as u32);
        cuts.sort_unstable();
        cuts.dedup();
        let seconds = |cut: &[u32]| self.group_s(cut[0] as usize..cut[1] as usize);
        cuts.windows(2).map(|cut| (cut[0]..cut[1], seconds(cut))).collect()
    }

    /// Exchange of consecutive layers with the same holders.
    fn group_s(&self, layers: std::ops::Range<usize>) -> f64 {
        let first = layers.start as u32;
        let (mut dense, mut routed) = ((0.0, 0.0), (0.0, 0.0));
        for class in self.classes[layers].iter().map(|class| &self.instance.classes[*class]) {
            dense = (dense.0 + class.gradient_bytes, dense.1 + class.parameter_bytes);
            if let Some(of) = &class.experts {
                routed = (routed.0 + of.gradient_bytes, routed.1 + of.parameter_bytes);
            }
        }
        let holders = self.holders(first, false);
        let apart = holders.iter().any(|of| of.parts > 1);
        if !apart {
            return self.shared_s(&holders, dense);
        }
        // What is dense has more copies than the experts: one after the other over the same links.
        let dense = (dense.0 - routed.0, dense.1 - routed.1);
        self.shared_s(&holders, dense) + self.shared_s(&self.holders(first, true), routed)
    }

    /// Exchange of so many bytes of gradients and of parameters among holders.
    fn shared_s(&self, holders: &[Holders], (gradient, parameter): (f64, f64)) -> f64 {
        let total: f64 = holders.iter().map(|h| h.groups).sum();
        if total < 1.5 || gradient <= 0.0 {
            return 0.0;
        }
        match self.instance.rules.exchange {
            Exchange::FlatRing { bucket_bytes } => {
                let least = holders.iter().map(|h| h.tensor_parallel).min().unwrap_or(1);
                self.flat_ring_s(holders, gradient / f64::from(least), bucket_bytes)
            }
            Exchange::Hierarchical => {
                let second = if self.layout.shard_optimizer { parameter } else { gradient };
                self.hierarchical_s(holders, gradient + second)
            }
        }
    }

    /// Who holds a layer, or its routed experts, a row for each template's stage, in the order of pools.
    fn holders(&self, layer: u32, experts: bool) -> Vec<Holders> {
        let mut holders: Vec<Holders> = self
            .layout
            .templates
            .iter()
            .filter_map(|t| {
                let stage = t.stages.iter().find(|s| (s.first_layer..s.end_layer).contains(&layer))?;
                let groups = f64::from(t.count) * f64::from(stage.replicas);
                let (parts, pool) = (stage.parts(), stage.pool);
                Some(if experts {
                    Holders { pool, tensor_parallel: stage.group_devices(), groups, parts }
                } else {
                    let groups = groups * f64::from(parts);
                    Holders { pool, tensor_parallel: stage.tensor_parallel, groups, parts }
                })
            })
            .collect();
        holders.sort_by_key(|h| (h.pool, h.tensor_parallel));
        holders
    }

    /// `2(n − 1) · t(bytes / n)` of each bucket over the slowest neighbouring link, the holders of one
    /// pool being neighbours of each other.
    fn flat_ring_s(&self, holders: &[Holders], bytes: f64, bucket_bytes: f64) -> f64 {
        let total: f64 = holders.iter().map(|h| h.groups).sum();
        let mut pools: Vec<(usize, f64)> = Vec::new();
        for of in holders {
            match pools.last_mut() {
                Some((pool, groups)) if *pool == of.pool => *groups += of.groups,
                _ => pools.push((of.pool, of.groups)),
            }
        }
        let mut links: Vec<(usize, usize)> =
            pools.iter().filter(|(_, groups)| *groups > 1.5).map(|(pool, _)| (*pool, *pool)).collect();
        if pools.len() > 1 {
            links.extend((0..pools.len()).map(|at| (pools[at].0, pools[(at + 1) % pools.len()].0)));
        }
        let ring = |bytes: f64| {
            let seconds =
                |link: &(usize, usize)| self.instance.inter[link.0][link.1].seconds(1, 1, bytes / total);
            2.0 * (total - 1.0) * links.iter().map(seconds).fold(0.0, f64::max)
        };
        let whole = (bytes / bucket_bytes).floor();
        let rest = bytes - whole * bucket_bytes;
        (if whole > 0.0 { whole * ring(bucket_bytes) } else { 0.0 }) + ring(rest)
    }

    /// Inside of nodes (replicas of one stage are packed together), then between the nodes of a pool,
    /// then between pools, where each node sends its part only; the slowest at each level counts.
    /// `bytes`: both directions together, of the whole layers.
    fn hierarchical_s(&self, holders: &[Holders], bytes: f64) -> f64 {
        let (mut inside, mut between) = (0.0f64, 0.0f64);
        let mut nodes: Vec<(usize, f64)> = Vec::new();
        for of in holders {
            let pool = &self.instance.pools[of.pool];
            let per_node = f64::from((pool.devices_per_node / of.tensor_parallel).max(1)).min(of.groups);
            let degree = f64::from(of.tensor_parallel);
            let devices = (per_node * degree) as u32;
            let own = bytes * (per_node - 1.0) / per_node / degree;
            inside = inside.max(pool.intra.seconds(devices, devices, own));
            let num = (of.groups / per_node).ceil();
            match nodes.last_mut() {
                Some((last, nodes)) if *last == of.pool => *nodes += num,
                _ => nodes.push((of.pool, num)),
            }
        }
        let fewest = nodes.iter().map(|(_, n)| *n).fold(f64::INFINITY, f64::min);
        let devices = |pool: usize| self.instance.pools[pool].devices_per_node;
        for (pool, num) in &nodes {
            let link = &self.instance.inter[*pool][*pool];
            between = between.max(link.seconds(devices(*pool), devices(*pool), bytes * (num - 1.0) / num));
        }
        let num_pools = nodes.len() as f64;
        let own = bytes * (num_pools - 1.0) / num_pools / fewest;
        let mut across = 0.0f64;
        for (p, q) in nodes.iter().flat_map(|p| nodes.iter().map(move |q| (p.0, q.0))).filter(|(p, q)| p != q)
        {
            across = across.max(self.instance.inter[p][q].seconds(devices(p), devices(q), own));
        }
        inside + between + across
    }
}

/// Stage instances of one pool and degree that hold a layer.
struct Holders {
    pool: usize,
    /// Devices that a copy is divided among.
    tensor_parallel: u32,
    /// Copies.
    groups: f64,
    /// Tensor-parallel groups among which experts are divided.
    parts: u32,
}

const UNKNOWN: PricedStage = PricedStage {
    forward_s: f64::INFINITY,
    backward_s: f64::INFINITY,
    transfer_s: 0.0,
    update_s: 0.0,
    exchange_s: 0.0,
    exposed_s: 0.0,
    busy: 0.0,
    memory_bytes: f64::INFINITY,
    in_flight: 0.0,
};

fn work(priced: &PricedStage, stage: &Stage) -> Work {
    let PricedStage { forward_s, backward_s, transfer_s, .. } = *priced;
    Work { forward_s, backward_s, transfer_s, recompute: stage.recompute }
}

fn layers_of<'a>(of_layers: &'a mut [f64], stage: &Stage) -> &'a mut [f64] {
    let end = (stage.end_layer as usize).min(of_layers.len());
    let first = (stage.first_layer as usize).min(end);
    &mut of_layers[first..end]
}
