//! A plain Burn loop over the same model: what a worker under hgct is compared with.
//!
//! One graph over the whole model, gradients and AdamW on the device, one read a step. Reads a line
//! a measurement from standard input: `WARM_UP STEPS` answers with the seconds of each counted step
//! (`{"seconds":[0.51,0.49]}`), `read-back COUNT` with those that reading all gradients takes once
//! they are computed.

use std::io::BufRead;
use std::path::Path;
use std::time::Instant;

use burn_tensor::{Device, Int, Tensor, TensorData, Transaction};
use hgct_core::model::ModelSpec;
use hgct_data::TokenFile;

use crate::error::{failed, guarded};
use crate::model::{self, Tables};
use crate::{BurnEngine, Result};

/// AdamW as the benchmark's recipe has it.
const LEARNING_RATE: f64 = 1e-3;
const BETAS: (f64, f64) = (0.9, 0.95);
const EPSILON: f64 = 1e-8;
const WEIGHT_DECAY: f64 = 0.1;

/// What is trained on what.
#[derive(Debug, Clone)]
pub struct Arguments<'a> {
    /// The adapter.
    pub device: &'a str,
    /// A `config.json`.
    pub config: &'a Path,
    /// A token file.
    pub tokens: &'a Path,
    /// Tokens a sample, samples a micro-batch, micro-batches a step.
    pub shape: [u32; 3],
}

/// Serves measurements until standard input ends.
pub fn run(arguments: &Arguments<'_>) -> Result<()> {
    let engine = BurnEngine::open(arguments.device)?;
    let text = std::fs::read_to_string(arguments.config)
        .map_err(|error| failed("plain", format!("{}: {error}", arguments.config.display())))?;
    let model = ModelSpec::from_config_json(&arguments.config.to_string_lossy(), &text)?;
    let tokens = TokenFile::open(arguments.tokens)?;
    guarded("plain", || {
        let mut training = Training::new(engine.device(), &model, &tokens, arguments.shape)?;
        println!("ready");
        for line in std::io::stdin().lock().lines() {
            let line = line.map_err(|error| failed("plain", error.to_string()))?;
            let words: Vec<&str> = line.split_whitespace().collect();
            let seconds = match words[..] {
                ["read-back", count] => training.read_back(number(count)?)?,
                [warm_up, steps] => training.measure(number(warm_up)?, number(steps)?)?,
                _ => return Err(failed("plain", format!("no measurement: {line}"))),
            };
            println!("{}", serde_json::json!({ "seconds": seconds }));
        }
        Ok(())
    })
}

fn number(word: &str) -> Result<usize> {
    word.parse().map_err(|_| failed("plain", format!("no number: {word}")))
}

/// A parameter with its moments.
struct Parameter {
    value: Tensor<2>,
    moments: Option<(Tensor<2>, Tensor<2>)>,
    decays: bool,
}

struct Training<'a> {
    device: &'a Device,
    model: &'a ModelSpec,
    tokens: &'a TokenFile,
    shape: [u32; 3],
    /// By layer, in the model's order.
    layers: Vec<Vec<Parameter>>,
    tables: Tables,
    cursor: u64,
    updates: i32,
}

impl<'a> Training<'a> {
    fn new(device: &'a Device, model: &'a ModelSpec, tokens: &'a TokenFile, shape: [u32; 3]) -> Result<Self> {
        if model.tie_embeddings {
            return Err(failed("plain", "tied embeddings are not supported here"));
        }
        let parameter = |spec: &hgct_core::model::TensorSpec| {
            let mut values = vec![0.0; spec.num_elements() as usize];
            hgct_core::init::fill(model, 0, spec, 0, &mut values);
            let value = Tensor::from_data(TensorData::new(values, crate::stage::dims(spec)), device);
            Parameter { value: value.autodiff().require_grad(), moments: None, decays: spec.decays() }
        };
        let layers = (0..model.num_placeable_layers())
            .map(|layer| model.layer_tensors(layer).iter().map(parameter).collect())
            .collect();
        let tables = Tables::new(model, shape[0] as usize, device);
        Ok(Self { device, model, tokens, shape, layers, tables, cursor: 0, updates: 0 })
    }

    fn measure(&mut self, warm_up: usize, steps: usize) -> Result<Vec<f64>> {
        let mut seconds = Vec::new();
        for step in 0..warm_up + steps {
            let begun = Instant::now();
            let (loss, gradients) = self.gradients()?;
            self.update(gradients);
            let loss: f32 = loss.into_scalar();
            if !loss.is_finite() {
                return Err(failed("plain", "the loss is not finite"));
            }
            if step >= warm_up {
                seconds.push(begun.elapsed().as_secs_f64());
            }
        }
        Ok(seconds)
    }

    fn read_back(&mut self, count: usize) -> Result<Vec<f64>> {
        let (_, gradients) = self.gradients()?;
        let wait = || self.device.sync().map_err(|error| failed("plain", error.to_string()));
        let mut seconds = Vec::new();
        for _ in 0..count {
            wait()?;
            let begun = Instant::now();
            // A transaction a layer, as a worker hands gradients out.
            for layer in &gradients {
                let mut reading = Transaction::default();
                for gradient in layer.iter().flatten() {
                    reading = reading.register(gradient.clone());
                }
                reading.try_execute().map_err(|error| failed("plain", error.to_string()))?;
            }
            seconds.push(begun.elapsed().as_secs_f64());
        }
        Ok(seconds)
    }

    /// Sum of losses and gradients, by layer, over a step's micro-batches.
    fn gradients(&mut self) -> Result<(Tensor<1>, Vec<Vec<Option<Tensor<2>>>>)> {
        let [seq_len, micro_batch, num_micro_batches] = self.shape;
        let samples = self.tokens.samples(seq_len)?;
        let mut sums: Vec<Vec<Option<Tensor<2>>>> =
            self.layers.iter().map(|layer| vec![None; layer.len()]).collect();
        let mut loss_sum = Tensor::<1>::zeros([1], self.device);
        for _ in 0..num_micro_batches {
            let (mut inputs, mut labels) = (Vec::new(), Vec::new());
            for _ in 0..micro_batch {
                samples.append(self.cursor % samples.len(), &mut inputs, &mut labels)?;
                self.cursor += 1;
            }
            let ids = |tokens: Vec<u32>| {
                let tokens: Vec<i32> = tokens.into_iter().map(u32::cast_signed).collect();
                let count = tokens.len();
                Tensor::<1, Int>::from_data(TensorData::new(tokens, [count]), self.device)
            };
            let loss = self.loss(ids(inputs), ids(labels));
            let mut found = loss.backward();
            for (layer, sums) in self.layers.iter().zip(&mut sums) {
                for (parameter, sum) in layer.iter().zip(sums) {
                    let new = parameter.value.grad_remove(&mut found);
                    *sum = match (sum.take(), new) {
                        (Some(sum), Some(new)) => Some(sum + new),
                        (sum, new) => sum.or(new),
                    };
                }
            }
            loss_sum = loss_sum + loss.inner();
        }
        Ok((loss_sum, sums))
    }

    fn loss(&self, ids: Tensor<1, Int>, labels: Tensor<1, Int>) -> Tensor<1> {
        let weights = |layer: &[Parameter]| layer.iter().map(|p| p.value.clone()).collect::<Vec<Tensor<2>>>();
        let (first, last) = (0, self.layers.len() - 1);
        let mut x = model::embedding(self.layers[first][0].value.clone(), ids);
        for layer in &self.layers[first + 1..last] {
            x = model::block(self.model, &weights(layer), x, &self.tables);
        }
        model::loss_sum(model::logits(self.model, &weights(&self.layers[last]), x), labels)
    }

    /// Mean over tokens, clipping to a norm of 1, AdamW.
    fn update(&mut self, gradients: Vec<Vec<Option<Tensor<2>>>>) {
        self.updates += 1;
        let tokens = self.shape.iter().map(|n| f64::from(*n)).product::<f64>();
        let squares = gradients.iter().flatten().flatten().map(|g| g.clone().square().sum());
        let square = squares.reduce(|a, b| a + b).unwrap_or_else(|| Tensor::zeros([1], self.device));
        let norm = square.sqrt().div_scalar(tokens);
        let factor = norm.add_scalar(1e-6).recip().clamp_max(1.0).div_scalar(tokens).reshape([1, 1]);
        let corrections = (1.0 - BETAS.0.powi(self.updates), 1.0 - BETAS.1.powi(self.updates));
        for (parameter, gradient) in self.layers.iter_mut().flatten().zip(gradients.into_iter().flatten()) {
            let Some(gradient) = gradient else { continue };
            let gradient = gradient * factor.clone();
            let (m, v) = match parameter.moments.take() {
                Some((m, v)) => (m.mul_scalar(BETAS.0), v.mul_scalar(BETAS.1)),
                None => (gradient.zeros_like(), gradient.zeros_like()),
            };
            let m = m + gradient.clone().mul_scalar(1.0 - BETAS.0);
            let v = v + gradient.square().mul_scalar(1.0 - BETAS.1);
            let size = v.clone().div_scalar(corrections.1).sqrt().add_scalar(EPSILON);
            let change = (m.clone() / size).mul_scalar(LEARNING_RATE / corrections.0);
            let decay = if parameter.decays { 1.0 - LEARNING_RATE * WEIGHT_DECAY } else { 1.0 };
            let value = parameter.value.clone().inner().mul_scalar(decay) - change;
            parameter.value = value.autodiff().require_grad();
            parameter.moments = Some((m, v));
        }
    }
}
