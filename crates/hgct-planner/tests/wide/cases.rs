//! Small instances from a seed.

use hgct_planner::instance::{
    CostRow, Curve, Exchange, Instance, LayerClass, LayerMemory, Link, LinkRow, Pool, Rules, Run, Transfer,
};

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn real(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// How large a case is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) pools: u64,
    pub(crate) devices: u32,
    pub(crate) layers: u32,
    pub(crate) batch: u64,
    pub(crate) tensor_parallel: bool,
}

fn link(random: &mut Random) -> Link {
    let curve = |random: &mut Random| Curve::AlphaBeta {
        latency_s: random.real(0.0, 0.01),
        bytes_per_s: random.real(20.0, 400.0),
    };
    let rows = (1..=2).map(|n| LinkRow { from: n, to: n, curve: curve(random) }).collect();
    Link { rows }
}

/// An instance of at most that size; memory is often short.
pub(crate) fn instance(seed: u64, size: Size) -> Instance {
    let mut random = Random(seed);
    let degrees: Vec<u32> = if size.tensor_parallel && random.below(2) == 0 { vec![1, 2] } else { vec![1] };
    let classes: Vec<LayerClass> = ["embedding", "block", "head"]
        .iter()
        .map(|name| {
            let bytes = random.real(10.0, 100.0);
            let activation = random.real(1.0, 30.0);
            LayerClass {
                name: (*name).into(),
                gradient_bytes: bytes,
                parameter_bytes: bytes,
                output_bytes: random.real(0.5, 10.0),
                experts: None,
                memory: degrees
                    .iter()
                    .map(|degree| LayerMemory {
                        state_bytes: 4.0 * bytes / f64::from(*degree),
                        optimizer_bytes: 2.0 * bytes / f64::from(*degree),
                        activation_bytes: activation / f64::from(*degree),
                        recompute_bytes: activation / 8.0,
                    })
                    .collect(),
            }
        })
        .collect();
    let blocks = 1 + random.below(u64::from(size.layers) - 1) as u32;
    let mut runs = vec![Run { class: 1, count: blocks }];
    if blocks < size.layers {
        runs.insert(0, Run { class: 0, count: 1 });
    }
    if blocks + 1 < size.layers {
        runs.push(Run { class: 2, count: 1 });
    }
    let sizes: &[u32] = random.pick(&[&[1], &[1, 2], &[2]]);
    let num = 1 + random.below(size.pools) as usize;
    let mut left = size.devices;
    let mut pools = Vec::new();
    for at in 0..num {
        let devices_per_node = if left >= 2 && random.below(2) == 0 { 2 } else { 1 };
        let most = (left / devices_per_node).saturating_sub((num - at - 1) as u32).max(1);
        let nodes = 1 + random.below(u64::from(most)) as u32;
        if left < nodes * devices_per_node {
            break;
        }
        left -= nodes * devices_per_node;
        let speed = random.real(0.5, 3.0);
        let mut costs = Vec::new();
        for degree in degrees.iter().filter(|d| **d <= devices_per_node) {
            for micro_batch in sizes {
                let by = speed / f64::from(*degree).powf(random.real(0.5, 1.0))
                    * f64::from(*micro_batch).powf(random.real(0.6, 1.0));
                let times = |low: f64, high: f64, random: &mut Random| -> Vec<f64> {
                    (0..3).map(|_| by * random.real(low, high)).collect()
                };
                costs.push(CostRow {
                    tensor_parallel: *degree,
                    expert_parallel: 1,
                    micro_batch: *micro_batch,
                    forward_s: times(0.02, 0.3, &mut random),
                    backward_s: times(0.05, 0.6, &mut random),
                    update_s: times(0.0, 0.05, &mut random),
                });
            }
        }
        pools.push(Pool {
            kind: format!("kind-{at}"),
            nodes,
            devices_per_node,
            memory_bytes: random.real(150.0, 2500.0),
            overhead_bytes: degrees.iter().map(|d| 10.0 * f64::from(*d)).collect(),
            intra: link(&mut random),
            costs,
        });
    }
    let inter = (0..pools.len()).map(|_| (0..pools.len()).map(|_| link(&mut random)).collect()).collect();
    let mut rules = Rules::published();
    rules.transfer = random.pick(&[Transfer::Published, Transfer::Serial, Transfer::Overlapped]);
    rules.exchange = Exchange::FlatRing { bucket_bytes: random.pick(&[50.0, 1e9]) };
    rules.recompute = random.below(4) == 0;
    Instance {
        degrees,
        classes,
        runs,
        pools,
        inter,
        global_batch: 2 * (1 + random.below(size.batch / 2) as u32),
        seq_len: 1,
        rules,
    }
}
