//! Experts that devices of a node divide: every layout of small instances, by a pricer that shares
//! nothing with the first but the types.

use std::collections::BTreeMap;

use hgct_planner::instance::{
    CostRow, Curve, ExpertClass, Instance, LayerClass, LayerMemory, Link, Pool, Rules, Run, Stage, check,
    check_instance, price,
};
use hgct_planner::wide::{Bound, Effort, find};

use crate::cases::Random;

/// Tensor parallel degree, devices of a group, what the field says.
const SHAPES: [(u32, u32, u32); 3] = [(1, 1, 1), (2, 2, 1), (1, 2, 2)];

/// One kind, two nodes of two; an embedding, two blocks with experts, a head.
fn instance(seed: u64) -> Instance {
    let mut random = Random(seed);
    let mut between = |low: f64, high: f64| random.real(low, high);
    let class = |name: &str, bytes: f64, experts: f64| LayerClass {
        name: name.into(),
        gradient_bytes: bytes,
        parameter_bytes: bytes,
        output_bytes: 40.0,
        memory: [1.0, 2.0]
            .map(|t| LayerMemory {
                state_bytes: 4.0 * bytes / t,
                optimizer_bytes: 12.0 * bytes / t,
                activation_bytes: 30.0 / t,
                recompute_bytes: 5.0,
            })
            .to_vec(),
        experts: (experts > 0.0).then_some(ExpertClass {
            gradient_bytes: bytes * experts,
            parameter_bytes: bytes * experts,
            state_bytes: 4.0 * bytes * experts,
            optimizer_bytes: 12.0 * bytes * experts,
        }),
    };
    let classes = vec![
        class("embedding", 40.0, 0.0),
        class("block", 100.0, between(0.5, 0.95)),
        class("head", 40.0, 0.0),
    ];
    let mut costs = Vec::new();
    for (tensor_parallel, group, expert_parallel) in SHAPES {
        for micro_batch in [1u32, 2] {
            let by = f64::from(micro_batch) / f64::from(tensor_parallel);
            let slow = if group > 1 { between(1.0, 1.3) } else { 1.0 };
            let seconds = |x: f64, y: f64| vec![0.2 * x * by * slow, y * by * slow, 0.5 * x * by * slow];
            let (x, y) = (between(0.2, 0.6), between(0.5, 1.5));
            costs.push(CostRow {
                tensor_parallel,
                expert_parallel,
                micro_batch,
                forward_s: seconds(x, y),
                backward_s: seconds(2.0 * x, 2.0 * y),
                update_s: vec![0.02, 0.1, 0.02],
            });
        }
    }
    let link = |bytes_per_s: f64| Link::uniform(Curve::AlphaBeta { latency_s: 1e-3, bytes_per_s });
    let pool = Pool {
        kind: "card".into(),
        nodes: 2,
        devices_per_node: 2,
        memory_bytes: between(1500.0, 5000.0),
        overhead_bytes: vec![10.0, 20.0],
        intra: link(2000.0),
        costs,
    };
    Instance {
        degrees: vec![1, 2],
        classes,
        runs: vec![Run { class: 0, count: 1 }, Run { class: 1, count: 2 }, Run { class: 2, count: 1 }],
        pools: vec![pool],
        inter: vec![vec![link(between(100.0, 1000.0))]],
        global_batch: 4 + (seed % 3) as u32 * 2,
        seq_len: 8,
        rules: Rules {
            exchange_overlap: 0.0,
            recompute: false,
            schedules: Vec::new(),
            ..Rules::hierarchical()
        },
    }
}

/// Micro-batch, micro-batches, stages as (first layer, end, shape).
type Pipe = (u32, u32, Vec<(usize, usize, usize)>);

fn seconds(link: &Link, bytes: f64) -> f64 {
    match link.rows[0].curve {
        Curve::AlphaBeta { latency_s, bytes_per_s } if bytes > 0.0 => latency_s + bytes / bytes_per_s,
        _ => 0.0,
    }
}

/// Seconds of a step, if it fits into memory.
fn step(instance: &Instance, pipes: &[Pipe]) -> Option<f64> {
    let pool = &instance.pools[0];
    let classes: Vec<usize> = instance.runs.iter().flat_map(|r| vec![r.class; r.count as usize]).collect();
    let stage_of = |pipe: &Pipe, layer: usize| pipe.2.iter().position(|s| s.1 > layer).unwrap();
    let shape_of = |pipe: &Pipe, layer: usize| SHAPES[pipe.2[stage_of(pipe, layer)].2];
    let parts = |(t, group, _): (u32, u32, u32)| f64::from(group / t);
    let dense_copies = |layer: usize| pipes.iter().map(|p| parts(shape_of(p, layer))).sum::<f64>();
    let expert_copies = pipes.len() as f64;
    let expert_part = |class: usize| instance.classes[class].experts.map_or(0.0, |e| e.state_bytes);
    let (mut slowest, mut update) = (0.0f64, 0.0f64);
    for pipe in pipes {
        let (b, m, stages) = pipe;
        let (mut sum, mut pace) = (0.0, 0.0f64);
        for (at, (first, end, shape)) in stages.iter().enumerate() {
            let shape = SHAPES[*shape];
            let (t, _, expert_parallel) = shape;
            let groups = shape.1 / t;
            if b % groups > 0 {
                return None;
            }
            let own = f64::from(b / groups);
            let row = pool.costs.iter().find(|r| {
                r.tensor_parallel == t && r.expert_parallel == expert_parallel && r.micro_batch == b / groups
            })?;
            let degree = (t - 1) as usize;
            let group = f64::from(shape.1);
            let (mut compute, mut bytes, mut updated) = (0.0, pool.overhead_bytes[shape.1 as usize - 1], 0.0);
            for (layer, class) in classes.iter().copied().enumerate().take(*end).skip(*first) {
                let of = &instance.classes[class].memory[degree];
                let experts = expert_part(class);
                let whole = 4.0 * instance.classes[class].gradient_bytes;
                compute += row.forward_s[class] + row.backward_s[class];
                // Bytes a device: dense by the degree, experts by the group; three times that in the
                // optimizer, divided among the copies of each.
                let (dense, routed) = ((whole - experts) / f64::from(t), experts / group);
                let optimizer = 3.0 * (dense / dense_copies(layer) + routed / expert_copies);
                bytes += dense + routed + optimizer + (stages.len() - at) as f64 * own * of.activation_bytes;
                updated += row.update_s[class] * optimizer / (3.0 * whole / f64::from(t));
            }
            if bytes > pool.memory_bytes {
                return None;
            }
            let ways = usize::from(at > 0) + usize::from(at + 1 < stages.len());
            let transfer = ways as f64 * seconds(&instance.inter[0][0], 40.0 * f64::from(*b));
            sum += compute + transfer;
            pace = pace.max(compute.max(transfer));
            update = update.max(updated);
        }
        slowest = slowest.max(sum + f64::from(m - 1) * pace);
    }
    // Alike pipelines are packed beside each other, unlike ones begin a node each.
    let mut alike: BTreeMap<&Pipe, f64> = BTreeMap::new();
    for pipe in pipes {
        *alike.entry(pipe).or_default() += 1.0;
    }
    let all_reduce = |layer: usize, bytes: f64, experts: bool| {
        let holders = alike.iter().map(|(pipe, count)| {
            let shape = shape_of(pipe, layer);
            if experts { (shape.1, *count) } else { (shape.0, count * parts(shape)) }
        });
        let holders: Vec<(u32, f64)> = holders.collect();
        if holders.iter().map(|(_, copies)| copies).sum::<f64>() < 1.5 || bytes <= 0.0 {
            return 0.0;
        }
        let beside = |(devices, copies): &(u32, f64)| f64::from(2 / devices).min(*copies);
        let inside = holders.iter().map(|of| {
            let n = beside(of);
            seconds(&pool.intra, bytes * (n - 1.0) / n / f64::from(of.0))
        });
        let nodes: f64 = holders.iter().map(|of| (of.1 / beside(of)).ceil()).sum();
        inside.fold(0.0, f64::max) + seconds(&instance.inter[0][0], bytes * (nodes - 1.0) / nodes)
    };
    let mut paid: Vec<Vec<f64>> = pipes.iter().map(|p| vec![0.0; p.2.len()]).collect();
    let mut layer = 0;
    while layer < classes.len() {
        let group: Vec<usize> = pipes.iter().map(|p| stage_of(p, layer)).collect();
        let (first, mut dense, mut routed) = (layer, 0.0, 0.0);
        while layer < classes.len() && pipes.iter().zip(&group).all(|(p, at)| stage_of(p, layer) == *at) {
            let experts = instance.classes[classes[layer]].experts.map_or(0.0, |e| e.gradient_bytes);
            dense += 2.0 * (instance.classes[classes[layer]].gradient_bytes - experts);
            routed += 2.0 * experts;
            layer += 1;
        }
        let apart = pipes.iter().any(|p| parts(shape_of(p, first)) > 1.5);
        let time = if apart {
            all_reduce(first, dense, false) + all_reduce(first, routed, true)
        } else {
            all_reduce(first, dense + routed, false)
        };
        for (pipe, at) in paid.iter_mut().zip(&group) {
            pipe[*at] += time;
        }
    }
    Some(slowest + update + paid.iter().flatten().copied().fold(0.0, f64::max))
}

/// Every way to cut the layers into stages on at most `left` devices.
fn cuts(
    layers: usize,
    first: usize,
    left: u32,
    so_far: &mut Vec<(usize, usize, usize)>,
    all: &mut Vec<Vec<(usize, usize, usize)>>,
) {
    if first == layers {
        return all.push(so_far.clone());
    }
    for (shape, (_, group, _)) in SHAPES.iter().enumerate().filter(|(_, shape)| shape.1 <= left) {
        for end in first + 1..=layers {
            so_far.push((first, end, shape));
            cuts(layers, end, left - group, so_far, all);
            so_far.pop();
        }
    }
}

fn devices(stages: &[(usize, usize, usize)]) -> u32 {
    stages.iter().map(|(_, _, shape)| SHAPES[*shape].1).sum()
}

/// Whether groups of two and of one fit into two nodes of two.
fn fits(pipes: &[Pipe]) -> bool {
    let groups = || pipes.iter().flat_map(|p| &p.2).map(|(_, _, shape)| SHAPES[*shape].1);
    let pairs = groups().filter(|g| *g == 2).count();
    pairs <= 2 && groups().sum::<u32>() <= 4
}

/// Adds pipelines that are no earlier than the last one until the batch is done.
fn grow(
    instance: &Instance,
    all: &[Vec<(usize, usize, usize)>],
    left: u32,
    from: usize,
    pipes: &mut Vec<Pipe>,
    best: &mut f64,
) {
    if left == 0 {
        if let Some(seconds) = step(instance, pipes) {
            *best = best.min(seconds);
        }
        return;
    }
    let used: u32 = pipes.iter().map(|p| devices(&p.2)).sum();
    for (at, stages) in all.iter().enumerate().skip(from) {
        if used + devices(stages) > 4 {
            continue;
        }
        for b in [1, 2, 4] {
            for m in 1..=left / b {
                pipes.push((b, m, stages.clone()));
                if fits(pipes) {
                    grow(instance, all, left - b * m, at, pipes, best);
                }
                pipes.pop();
            }
        }
    }
}

#[test]
fn small_instances_have_the_optimum_of_all_layouts() {
    let (mut divided, mut none) = (0, 0);
    for seed in 0..60 {
        let instance = instance(seed);
        assert_eq!(check_instance(&instance), vec![]);
        let found = find(&instance, None, &Effort::default()).unwrap();
        let mut all = Vec::new();
        cuts(4, 0, 4, &mut Vec::new(), &mut all);
        let mut best = f64::INFINITY;
        grow(&instance, &all, instance.global_batch, 0, &mut Vec::new(), &mut best);
        let Some((layout, priced)) = found.best else {
            assert!(best.is_infinite(), "seed {seed}: {best} exists");
            none += 1;
            continue;
        };
        assert_eq!(check(&instance, &layout), vec![]);
        let seconds = priced.iteration_s;
        assert!((seconds / best - 1.0).abs() < 1e-6, "seed {seed}: {seconds}, the optimum is {best}");
        assert!(Bound::up_to(&instance, seconds).seconds <= seconds * (1.0 + 1e-9), "seed {seed}");
        let is_divided = |s: &Stage| s.expert_parallel > 1;
        divided += usize::from(layout.templates.iter().flat_map(|t| &t.stages).any(is_divided));
        // Both pricers agree on the layout itself.
        let pipes: Vec<Pipe> = layout
            .templates
            .iter()
            .flat_map(|t| {
                let stages = t.stages.iter().map(|s| {
                    let shape = (s.tensor_parallel, s.group_devices(), s.expert_parallel);
                    let at = SHAPES.iter().position(|of| *of == shape).unwrap();
                    (s.first_layer as usize, s.end_layer as usize, at)
                });
                vec![(t.micro_batch, t.num_micro_batches, stages.collect()); t.count as usize]
            })
            .collect();
        let again = step(&instance, &pipes).unwrap();
        assert!((again / price(&instance, &layout).iteration_s - 1.0).abs() < 1e-9, "seed {seed}");
    }
    assert!(divided > 5 && none < 30, "{divided} layouts divide experts, {none} instances fit nowhere");
}
