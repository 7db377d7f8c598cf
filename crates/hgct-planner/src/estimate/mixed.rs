//! Tensor parallelism over two unlike kinds, which nobody should want and somebody may have to.

use crate::instance::{CostRow, Instance, Link, Pool};

/// Size of a message by which links are compared, bytes.
const LARGE: f64 = 1e9;

/// The problem with nodes of pools `a` and `b` taken together in pairs, as one pool whose groups are
/// half of the one and half of the other; what has no partner stays where it was. The new pool is the
/// last.
///
/// Both halves wait for the slower one, memory is the smaller one's. Every all-reduce runs inside each
/// half as it would on its own kind, and then moves the whole tensor between the halves over the link of
/// the two pools: two a block in each direction, one in embedding and head. `None` if the pools are the
/// same, or have no degree in common that a pair of nodes could use.
pub fn mixed(instance: &Instance, a: usize, b: usize) -> Option<Instance> {
    let (of_a, of_b) = (instance.pools.get(a)?, instance.pools.get(b).filter(|_| a != b)?);
    let pairs = of_a.nodes.min(of_b.nodes);
    let half = of_a.devices_per_node.min(of_b.devices_per_node);
    let costs: Vec<CostRow> = of_a
        .costs
        .iter()
        .filter(|row| row.expert_parallel == 1)
        .filter(|row| row.tensor_parallel.is_multiple_of(2) && row.tensor_parallel <= 2 * half)
        .filter_map(|row| together(instance, (a, b), row, of_b.cost(row.tensor_parallel, row.micro_batch)?))
        .collect();
    if pairs == 0 || costs.is_empty() {
        return None;
    }
    let overhead = of_a.overhead_bytes.iter().zip(&of_b.overhead_bytes);
    let pool = Pool {
        kind: format!("{}+{}", of_a.kind, of_b.kind),
        nodes: pairs,
        devices_per_node: 2 * half,
        memory_bytes: of_a.memory_bytes.min(of_b.memory_bytes),
        overhead_bytes: overhead.map(|(a, b)| a.max(*b)).collect(),
        intra: slower(&of_a.intra, &of_b.intra).clone(),
        costs,
    };
    let mut of = instance.clone();
    of.pools[a].nodes -= pairs;
    of.pools[b].nodes -= pairs;
    // From and to the pair, whichever half is the slower.
    let mut out: Vec<Link> = (0..instance.pools.len())
        .map(|q| slower(&instance.inter[a][q], &instance.inter[b][q]).clone())
        .collect();
    for (p, row) in of.inter.iter_mut().enumerate() {
        row.push(slower(&instance.inter[p][a], &instance.inter[p][b]).clone());
    }
    out.push(slower(&instance.inter[a][a], &instance.inter[b][b]).clone());
    of.inter.push(out);
    of.pools.push(pool);
    Some(of)
}

/// A row of both kinds' together.
fn together(instance: &Instance, (a, b): (usize, usize), of_a: &CostRow, of_b: &CostRow) -> Option<CostRow> {
    let half = of_a.tensor_parallel / 2;
    let (first, last) = (instance.runs.first()?.class, instance.runs.last()?.class);
    let between: Vec<f64> = instance
        .classes
        .iter()
        .enumerate()
        .map(|(class, of)| {
            let num = if class == first || class == last { 1.0 } else { 2.0 };
            let bytes = of.output_bytes * f64::from(of_a.micro_batch);
            let seconds = |p: usize, q: usize| instance.inter[p][q].seconds(half, half, bytes);
            num * seconds(a, b).max(seconds(b, a))
        })
        .collect();
    let slower = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x.max(*y)).collect::<Vec<f64>>();
    let all = |x: &[f64], y: &[f64]| slower(x, y).iter().zip(&between).map(|(x, y)| x + y).collect();
    Some(CostRow {
        tensor_parallel: of_a.tensor_parallel,
        expert_parallel: 1,
        micro_batch: of_a.micro_batch,
        forward_s: all(&of_a.forward_s, &of_b.forward_s),
        backward_s: all(&of_a.backward_s, &of_b.backward_s),
        update_s: slower(&of_a.update_s, &of_b.update_s),
    })
}

fn slower<'l>(a: &'l Link, b: &'l Link) -> &'l Link {
    let seconds = |link: &Link| link.seconds(u32::MAX, u32::MAX, LARGE);
    if seconds(a) >= seconds(b) { a } else { b }
}
