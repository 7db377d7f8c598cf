//! A second pricer that shares nothing with the first but the types.

use hgct_planner::instance::{Curve, Exchange, Instance, Layout, Link, Stage, Transfer};

fn seconds(link: &Link, from: u32, to: u32, bytes: f64) -> f64 {
    let mut best: Option<(u32, u32, Curve)> = None;
    for row in &link.rows {
        let inside = row.from <= from && row.to <= to;
        if inside && best.is_none_or(|(a, b, _)| (row.from, row.to) > (a, b)) {
            best = Some((row.from, row.to, row.curve));
        }
    }
    let curve = best.map_or(link.rows[0].curve, |(_, _, curve)| curve);
    match curve {
        Curve::AlphaBeta { latency_s, bytes_per_s } if bytes > 0.0 => latency_s + bytes / bytes_per_s,
        Curve::AlphaBeta { .. } => 0.0,
        Curve::Polynomial { .. } => panic!("not in these cases"),
    }
}

/// A pipeline as (micro-batch, stages).
pub(crate) type Pipe = (u32, Vec<Stage>);

/// Compute and transfer of each stage, for one micro-batch, and memory.
pub(crate) fn stages(instance: &Instance, (micro_batch, stages): &Pipe) -> Vec<(f64, f64, bool)> {
    let classes: Vec<usize> =
        instance.runs.iter().flat_map(|run| vec![run.class; run.count as usize]).collect();
    let k = stages.len();
    let b = f64::from(*micro_batch);
    let per_node = |s: &Stage| s.tensor_parallel.min(instance.pools[s.pool].devices_per_node);
    (0..k)
        .map(|i| {
            let s = &stages[i];
            let pool = &instance.pools[s.pool];
            let row = pool
                .costs
                .iter()
                .find(|r| r.tensor_parallel == s.tensor_parallel && r.micro_batch == *micro_batch)
                .unwrap();
            let degree = instance.degrees.iter().position(|d| *d == s.tensor_parallel).unwrap();
            let (mut compute, mut bytes, mut working) = (0.0, pool.overhead_bytes[degree], 0.0f64);
            for layer in s.first_layer..s.end_layer {
                let class = classes[layer as usize];
                let memory = instance.classes[class].memory[degree];
                compute += row.backward_s[class] + row.forward_s[class] * if s.recompute { 2.0 } else { 1.0 };
                let kept = if s.recompute { memory.recompute_bytes } else { memory.activation_bytes };
                bytes += memory.state_bytes + memory.optimizer_bytes + (k - i) as f64 * b * kept;
                if s.recompute {
                    working = working.max(b * memory.activation_bytes);
                }
            }
            let mut transfer = 0.0;
            if i + 1 < k {
                let out = instance.classes[classes[s.end_layer as usize - 1]].output_bytes * b;
                let t = &stages[i + 1];
                let once = seconds(&instance.inter[s.pool][t.pool], per_node(s), per_node(t), out);
                let twice = instance.rules.transfer == Transfer::Published && i == 0 && k > 3;
                transfer += if twice { 2.0 * once } else { once };
            }
            if i > 0 {
                let back = instance.classes[classes[s.first_layer as usize - 1]].output_bytes * b;
                let t = &stages[i - 1];
                let once = seconds(&instance.inter[s.pool][t.pool], per_node(s), per_node(t), back);
                let twice = instance.rules.transfer == Transfer::Published && i + 1 == k;
                transfer += if twice { 2.0 * once } else { once };
            }
            (compute, transfer, bytes + working <= pool.memory_bytes)
        })
        .collect()
}

fn pipeline_s(instance: &Instance, pipe: &Pipe, micro_batches: u32) -> f64 {
    let rows = stages(instance, pipe);
    let sum: f64 = rows.iter().map(|(c, t, _)| c + t).sum();
    let pace = rows.iter().map(|(c, t, _)| match instance.rules.transfer {
        Transfer::Overlapped => c.max(*t),
        _ => c + t,
    });
    sum + f64::from(micro_batches - 1) * pace.fold(0.0, f64::max)
}

/// The largest exchange of any device, by walking over layers.
pub(crate) fn exchange_s(instance: &Instance, pipes: &[Pipe]) -> f64 {
    let Exchange::FlatRing { bucket_bytes } = instance.rules.exchange else { panic!("not in these cases") };
    let classes: Vec<usize> =
        instance.runs.iter().flat_map(|run| vec![run.class; run.count as usize]).collect();
    let holder = |pipe: &Pipe, layer: u32| pipe.1.iter().position(|s| s.end_layer > layer).unwrap();
    let n = pipes.len() as f64;
    if pipes.len() < 2 {
        return 0.0;
    }
    let mut paid: Vec<Vec<f64>> = pipes.iter().map(|p| vec![0.0; p.1.len()]).collect();
    let mut layer = 0u32;
    while (layer as usize) < classes.len() {
        let group: Vec<usize> = pipes.iter().map(|p| holder(p, layer)).collect();
        let mut bytes = 0.0;
        while (layer as usize) < classes.len()
            && pipes.iter().zip(&group).all(|(p, at)| holder(p, layer) == *at)
        {
            bytes += instance.classes[classes[layer as usize]].gradient_bytes;
            layer += 1;
        }
        let owners: Vec<&Stage> = pipes.iter().zip(&group).map(|(p, at)| &p.1[*at]).collect();
        bytes /= f64::from(owners.iter().map(|s| s.tensor_parallel).min().unwrap());
        let mut order: Vec<usize> = owners.iter().map(|s| s.pool).collect();
        order.sort_unstable();
        let mut time = 0.0;
        let mut left = bytes;
        while left > 0.0 {
            let bucket = left.min(bucket_bytes);
            let slowest = (0..order.len())
                .map(|i| {
                    let (p, q) = (order[i], order[(i + 1) % order.len()]);
                    seconds(&instance.inter[p][q], 1, 1, bucket / n)
                })
                .fold(0.0, f64::max);
            time += 2.0 * (n - 1.0) * slowest;
            left -= bucket;
        }
        for (pipe, at) in paid.iter_mut().zip(&group) {
            pipe[*at] += time;
        }
    }
    paid.iter().flatten().copied().fold(0.0, f64::max)
}

pub(crate) fn update_s(instance: &Instance, pipes: &[Pipe]) -> f64 {
    let classes: Vec<usize> =
        instance.runs.iter().flat_map(|run| vec![run.class; run.count as usize]).collect();
    let of = |(b, stages): &Pipe| {
        let b = *b;
        let of = |s: &Stage| {
            let rows = &instance.pools[s.pool].costs;
            let row = rows.iter().find(|r| r.tensor_parallel == s.tensor_parallel && r.micro_batch == b);
            row.unwrap().update_s[classes[s.first_layer as usize]]
        };
        stages.iter().map(of).fold(0.0, f64::max)
    };
    pipes.iter().map(of).fold(0.0, f64::max)
}

/// The second pricer on a whole layout.
pub(crate) fn second_price(instance: &Instance, layout: &Layout) -> f64 {
    let mut all = Vec::new();
    let mut slowest = 0.0f64;
    for t in &layout.templates {
        let pipe = (t.micro_batch, t.stages.clone());
        slowest = slowest.max(pipeline_s(instance, &pipe, t.num_micro_batches));
        all.extend((0..t.count).map(|_| pipe.clone()));
    }
    slowest + exchange_s(instance, &all) + update_s(instance, &all)
}
