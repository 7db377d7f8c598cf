//! Burn behind the engine interface.

use std::collections::BTreeMap;
use std::time::Instant;

use burn_tensor::wgpu::wgpu;
use burn_tensor::{DType as BurnDType, Device};
use hgct_core::dtype::DType;
use hgct_core::model::{ModelSpec, RopeScaling};
use hgct_core::plan::StageId;
use hgct_worker::Result;
use hgct_worker::engine::{
    BackwardPart, Edge, Engine, EngineDescription, GradientReady, Granularity, ImportRows, Lease, StageLoad,
    Ticket,
};

use crate::adapter::{self, Opened};
use crate::error::{NAME, failed, guarded};
use crate::stage::Stage;

/// The version of Burn that `Cargo.toml` pins.
pub const BURN_VERSION: &str = "0.22.1";

/// One adapter, driven through Burn and wgpu. f32 only.
pub struct BurnEngine {
    description: EngineDescription,
    opened: Opened,
    stages: BTreeMap<StageId, Stage>,
}

impl BurnEngine {
    /// Opens the adapter of that device string.
    pub fn open(device_string: &str) -> Result<Self> {
        guarded("open", || {
            let adapter = adapter::find(device_string).map_err(|message| failed("open", message))?;
            let memory_bytes = adapter.memory_bytes;
            let opened = adapter.open().map_err(|message| failed("open", message))?;
            if !opened.device.supports_dtype(BurnDType::F32) {
                return Err(failed("open", format!("{device_string} has no f32 kernels")));
            }
            let description = EngineDescription {
                engine: NAME.into(),
                framework_version: BURN_VERSION.into(),
                device: device_string.into(),
                dtypes: vec![DType::F32],
                granularity: Granularity::Layer,
                split_backward: false,
                recompute: true,
                tensor_parallel: false,
                deterministic: true,
                memory_bytes,
            };
            Ok(Self { description, opened, stages: BTreeMap::new() })
        })
    }

    /// Compiles the kernels of a small model, and so most of any model's, before anybody waits for
    /// this worker or holds it to a quota. Nothing stays loaded.
    pub fn prepare(&mut self) -> Result<()> {
        let begin = Instant::now();
        for model in prepared_models() {
            let layers = 0..model.num_placeable_layers();
            let stage = StageLoad { stage: StageId(0), model, layers, recompute: false };
            self.load(&[stage])?;
            self.on_stage("prepare", StageId(0), |stage| stage.warm_up(2, 64))?;
        }
        self.load(&[])?;
        eprintln!("hgct worker: first kernels compiled after {:.1} s", begin.elapsed().as_secs_f64());
        Ok(())
    }

    /// The device as wgpu knows it.
    pub fn raw_device(&self) -> &wgpu::Device {
        &self.opened.raw
    }

    /// The device for tensors without a graph.
    pub fn device(&self) -> &Device {
        &self.opened.device
    }

    fn on_stage<T>(
        &mut self,
        operation: &'static str,
        stage: StageId,
        body: impl FnOnce(&mut Stage) -> Result<T>,
    ) -> Result<T> {
        let loaded = self.stages.get_mut(&stage);
        let loaded = loaded.ok_or_else(|| failed(operation, format!("{stage} is not loaded")))?;
        guarded(operation, || body(loaded))
    }
}

impl Engine for BurnEngine {
    fn describe(&self) -> &EngineDescription {
        &self.description
    }

    fn tensor_bytes(&self) -> Option<u64> {
        let usage = guarded("tensor_bytes", || Ok(self.opened.device.memory_pool_usage()));
        usage.ok().flatten().map(|usage| usage.bytes_in_use)
    }

    fn load(&mut self, stages: &[StageLoad]) -> Result<()> {
        self.stages.clear();
        let Opened { device, largest_tensor_bytes, .. } = &self.opened;
        self.stages = guarded("load", || {
            // What earlier stages left is given back first: the next ones may need all of it.
            device.sync().map_err(|error| failed("load", error.to_string()))?;
            device.memory_cleanup();
            // An adapter without memory of its own takes the host's, which grants are for.
            let has = self.description.memory_bytes;
            let budget = has.map(|has| self.opened.budget_bytes().map_or(has, |budget| budget.min(has)));
            fits(stages, budget).map_err(|message| failed("load", message))?;
            let stage = |load: &StageLoad| Ok((load.stage, Stage::new(load, device, *largest_tensor_bytes)?));
            let made = stages.iter().map(stage).collect::<Result<BTreeMap<_, _>>>()?;
            made.values().try_for_each(Stage::is_there)?;
            Ok(made)
        })?;
        Ok(())
    }

    fn warm_up(&mut self, stage: StageId, samples: u64, seq_len: u64) -> Result<()> {
        let begin = Instant::now();
        self.on_stage("warm_up", stage, |stage| stage.warm_up(samples, seq_len))?;
        let seconds = begin.elapsed().as_secs_f64();
        eprintln!(
            "hgct worker: {stage}: kernels for {samples} samples of {seq_len} tokens ready after {seconds:.1} s"
        );
        Ok(())
    }

    fn import(&mut self, stage: StageId, rows: &[ImportRows]) -> Result<()> {
        self.on_stage("import", stage, |stage| stage.import(rows))
    }

    fn export(&mut self, stage: StageId, names: &[String]) -> Result<Vec<Lease>> {
        self.on_stage("export", stage, |stage| stage.export(names))
    }

    fn zero_gradients(&mut self, stage: StageId) -> Result<()> {
        self.on_stage("zero_gradients", stage, |stage| {
            stage.zero_gradients();
            Ok(())
        })
    }

    fn forward(&mut self, stage: StageId, micro_batch: u32, inputs: Edge) -> Result<Ticket<Edge>> {
        self.on_stage("forward", stage, |stage| stage.forward(micro_batch, inputs)).map(Ticket::Ready)
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
            return Err(failed("backward", "split backward is not supported yet"));
        }
        self.on_stage("backward", stage, |stage| stage.backward(micro_batch, gradients, ready))
            .map(Ticket::Ready)
    }

    fn evaluate(&mut self, stage: StageId, inputs: Edge) -> Result<Ticket<Edge>> {
        self.on_stage("evaluate", stage, |stage| stage.evaluate("evaluate", inputs, false)).map(Ticket::Ready)
    }

    fn logits(&mut self, stage: StageId, inputs: Edge) -> Result<Ticket<Edge>> {
        self.on_stage("logits", stage, |stage| stage.evaluate("logits", inputs, true)).map(Ticket::Ready)
    }

    fn drop_micro_batch(&mut self, micro_batch: u32) -> Result<()> {
        for stage in self.stages.values_mut() {
            stage.live.remove(&micro_batch);
        }
        Ok(())
    }

    fn abort(&mut self) -> Result<()> {
        self.stages.values_mut().for_each(|stage| stage.live.clear());
        Ok(())
    }
}

/// Whether parameters and gradients of the stages fit into a card's memory at all.
fn fits(stages: &[StageLoad], budget_bytes: Option<u64>) -> std::result::Result<(), String> {
    let bytes = |load: &StageLoad| -> u64 {
        load.model
            .stage_tensors(load.layers.clone())
            .iter()
            .map(|(_, tensor)| 8 * tensor.num_elements())
            .sum()
    };
    let wanted = stages.iter().map(bytes).sum::<u64>();
    match budget_bytes {
        Some(has) if wanted > has => Err(format!(
            "out of memory: parameters and gradients take {wanted} bytes, the adapter has {has} for this worker: \
             give it fewer layers, end what else uses it, or name other devices in `policy.devices`"
        )),
        _ => Ok(()),
    }
}

/// Shared key-value heads and not, narrow and wide: kernels are made for such differences.
fn prepared_models() -> [ModelSpec; 2] {
    let narrow = ModelSpec {
        vocab_size: 96,
        hidden_size: 64,
        intermediate_size: 80,
        num_layers: 1,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::Default,
        tie_embeddings: false,
        max_position: 64,
        initializer_range: 0.02,
    };
    let wide = ModelSpec {
        vocab_size: 512,
        hidden_size: 256,
        intermediate_size: 512,
        num_kv_heads: 4,
        head_dim: 64,
        ..narrow.clone()
    };
    [narrow, wide]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_that_of_the_manifest() {
        let pin = format!("burn-tensor = {{ version = \"={BURN_VERSION}\"");
        assert!(include_str!("../Cargo.toml").contains(&pin));
    }

    #[test]
    fn stages_that_cannot_fit_are_refused_before_anything_is_made() {
        let [narrow, _] = prepared_models();
        let load = StageLoad { stage: StageId(0), model: narrow, layers: 0..3, recompute: false };
        let error = fits(std::slice::from_ref(&load), Some(200_000)).unwrap_err();
        assert!(error.starts_with("out of memory: parameters and gradients take "), "{error}");
        assert_eq!(fits(std::slice::from_ref(&load), Some(2 << 20)), Ok(()));
        assert_eq!(fits(&[load], None), Ok(()));
    }
}
