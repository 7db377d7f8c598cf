//! Seeded instances.

use hgct_core::canonical::Hash;
use hgct_core::cluster::{ClusterSpec, DeviceSpec, Grant, Isolation, NodeSpec};
use hgct_core::ids::{DeviceId, EnvironmentId, Kind, NodeId};
use hgct_core::job::JobSpec;
use hgct_core::model::{LayerKind, ModelSpec};
use hgct_core::profile::{DeviceProfile, LayerProfile, LinkProfile, Profile, Spread};

use crate::PlanInput;

/// Two words into one that looks random (splitmix64's finisher, Steele et al. 2014).
pub(crate) fn mix(seed: u64, what: u64) -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(what.wrapping_add(1) << 17);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[derive(Debug, Clone)]
pub(crate) struct Instance {
    pub(crate) job: JobSpec,
    pub(crate) model: ModelSpec,
    pub(crate) cluster: ClusterSpec,
    pub(crate) profile: Profile,
}

impl Instance {
    pub(crate) fn input(&self) -> PlanInput<'_> {
        PlanInput { job: &self.job, model: &self.model, cluster: &self.cluster, profile: &self.profile }
    }

    /// The same without some devices.
    pub(crate) fn without(&self, remove: &[usize]) -> Self {
        let mut other = self.clone();
        let keep = |at: usize| !remove.contains(&at);
        let devices = std::mem::take(&mut other.cluster.nodes[0].devices);
        other.cluster.nodes[0].devices =
            devices.into_iter().enumerate().filter(|(at, _)| keep(*at)).map(|(_, d)| d).collect();
        other
    }
}

/// What an instance is made of.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) num_layers: u32,
    pub(crate) global_batch: u32,
    pub(crate) sizes: Vec<u32>,
    /// Thousandths by which each device is slower than the first of the table.
    pub(crate) slowness: Vec<u64>,
    /// The kind of each device.
    pub(crate) kinds: Vec<u32>,
    pub(crate) tied: bool,
    pub(crate) seed: u64,
}

impl Shape {
    /// Four unlike stacks on one processor, with the quotas of the bench.
    pub(crate) fn four_kinds() -> Self {
        Self {
            num_layers: 8,
            global_batch: 64,
            sizes: vec![1, 2, 4],
            slowness: vec![1000, 1400, 1800, 3000],
            kinds: vec![0, 1, 2, 3],
            tied: false,
            seed: 1,
        }
    }

    pub(crate) fn build(&self) -> Instance {
        let model = model(self.num_layers, self.tied);
        let devices: Vec<DeviceSpec> = (0..self.slowness.len()).map(|at| self.device(at)).collect();
        let profile = Profile {
            format: Profile::FORMAT,
            measured_at: "2026-01-02T03:04:05Z".into(),
            model: Hash::of(&model),
            seq_len: 128,
            isolation: Isolation::Cgroup,
            devices: (0..devices.len()).map(|at| self.row(&devices[at], at)).collect(),
            links: links(&devices),
        };
        let job = format!(
            "name = 'x'\n[model]\nconfig = 'config.json'\n[data]\npaths = ['a']\n[recipe]\nsteps = 10\n\
             global_batch = {}\nseq_len = 128\nlearning_rate = 0.01\n",
            self.global_batch
        );
        Instance {
            job: JobSpec::from_toml("job.toml", &job).unwrap(),
            cluster: ClusterSpec {
                format: ClusterSpec::FORMAT,
                nodes: vec![NodeSpec {
                    name: NodeId::new("local").unwrap(),
                    cores: 64,
                    memory_bytes: 64 << 30,
                    isolation: Isolation::Cgroup,
                    devices,
                }],
            },
            model,
            profile,
        }
    }

    fn device(&self, at: usize) -> DeviceSpec {
        let engine = ["torch", "jax", "paddle", "mlx"][self.kinds[at] as usize % 4];
        DeviceSpec {
            id: DeviceId::new(format!("local/{engine}:{at}")).unwrap(),
            kind: Kind::new(format!("cpu/{engine}")).unwrap(),
            vendor: "cpu".into(),
            identity: "cpu".into(),
            engine: engine.into(),
            device_string: "cpu".into(),
            environment: EnvironmentId::new(engine).unwrap(),
            environment_hash: Hash::of_bytes(engine.as_bytes()),
            framework_version: "1".into(),
            driver: None,
            memory_bytes: 0,
            host_resource: "cpu".into(),
            grant: Grant { cpu_millicores: 400, cores: vec![0], threads: 1, memory_bytes: 4 << 30 },
        }
    }

    fn row(&self, device: &DeviceSpec, at: usize) -> DeviceProfile {
        // Alike devices of one kind have alike rows.
        let noise = |what: u64| {
            let draw = mix(self.seed, u64::from(self.kinds[at]) * 64 + what) % 201;
            900 + draw
        };
        let slow = self.slowness[at];
        let mut layers = Vec::new();
        for (k, (layer, base)) in
            [(LayerKind::Embedding, 40_000u64), (LayerKind::Block, 2_000_000), (LayerKind::Head, 3_000_000)]
                .into_iter()
                .enumerate()
        {
            for size in &self.sizes {
                // Larger micro-batches are a little cheaper a sample.
                let samples = u64::from(*size) * 900 + 100;
                let forward = base * samples / 1000 * slow / 1000 * noise(k as u64) / 1000;
                let spread = |ns: u64| Spread { median_ns: ns, min_ns: ns, max_ns: ns, num_samples: 5 };
                layers.push(LayerProfile {
                    layer,
                    micro_batch: *size,
                    forward: spread(forward),
                    backward: spread(2 * forward * noise(k as u64 + 8) / 1000),
                    activation_bytes: u64::from(*size) * [1 << 16, 6 << 20, 4 << 20][k],
                    workspace_bytes: 0,
                });
            }
        }
        DeviceProfile {
            device: device.id.clone(),
            kind: device.kind.clone(),
            environment_hash: device.environment_hash.clone(),
            framework: format!("{} 1", device.engine),
            grant: device.grant.clone(),
            layers,
            reduce_ps_per_element: 800 * noise(20) / 1000,
            update_ps_per_element: 4000 * noise(21) / 1000,
            import_ps_per_byte: 200 * noise(22) / 1000,
            send_ps_per_byte: 300 * noise(23) / 1000,
            action_overhead_ns: 50_000,
            base_memory_bytes: 200 << 20,
        }
    }
}

fn links(devices: &[DeviceSpec]) -> Vec<LinkProfile> {
    let mut links = Vec::new();
    for from in devices {
        for to in devices.iter().filter(|to| to.id != from.id) {
            links.push(LinkProfile {
                from: from.id.clone(),
                to: to.id.clone(),
                transport: "tcp".into(),
                latency_ns: 60_000,
                bytes_per_s: 1_500_000_000,
            });
        }
    }
    links
}

pub(crate) fn model(num_layers: u32, tied: bool) -> ModelSpec {
    let text = format!(
        r#"{{"model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688,
            "num_hidden_layers": {num_layers}, "num_attention_heads": 4, "num_key_value_heads": 2,
            "tie_word_embeddings": {tied}}}"#
    );
    ModelSpec::from_config_json("config.json", &text).unwrap()
}
