//! Continuing prompts through the pipeline: a few lines that the model writes.

use std::sync::Arc;

use hgct_comm::{SendBuffer, Tag, TagKind};
use hgct_core::dtype::DType;
use hgct_core::init::uniform_at;
use hgct_core::plan::StageId;
use hgct_core::schedule::neighbour;

use super::{Trainer, tokens};
use crate::Result;
use crate::engine::{Edge, Lease};

/// Separates the messages of generation from all others in a tag's step.
const GENERATION: u64 = 1 << 63;

impl Trainer {
    /// Adds `num_tokens` to each prompt with pipeline 0; all of its ranks must call it. Answers
    /// with the sequences on the rank of the head, with `None` elsewhere. Prompts and added tokens
    /// must fit into the sequence length; as many prompts as a micro-batch has samples are used.
    pub fn generate(
        &mut self,
        prompts: &[Vec<u32>],
        num_tokens: u32,
        seed: u64,
        temperature: f64,
    ) -> Result<Option<Vec<Vec<u32>>>> {
        let Some(pipeline) = self.plan.pipelines.first().cloned() else { return Ok(None) };
        let mine: Vec<StageId> =
            pipeline.stages.iter().copied().filter(|id| self.stages.contains(id)).collect();
        if mine.is_empty() {
            return Ok(None);
        }
        let (seq_len, width) = (self.plan.seq_len as usize, pipeline.micro_batch as usize);
        let mut sequences: Vec<Vec<u32>> = prompts.iter().take(width).cloned().collect();
        let start = sequences.first().map_or(0, Vec::len);
        if start == 0 || sequences.iter().any(|s| s.len() != start) || start + num_tokens as usize > seq_len {
            return Err(self.protocol(format!(
                "prompts of equal length with {num_tokens} more tokens must fit into {seq_len}"
            )));
        }
        let (first_rank, last_rank) = (
            self.plan.stage(pipeline.stages[0]).rank(),
            self.plan.stage(pipeline.stages[pipeline.stages.len() - 1]).rank(),
        );
        for added in 0..num_tokens {
            let step = GENERATION | u64::from(added);
            let mut logits = None;
            for stage in &mine {
                logits = self.logits_of(*stage, &sequences, width, step)?.or(logits);
            }
            // The head chooses; the embedding, wherever it is, hears of it.
            if self.rank == last_rank {
                let logits = logits.ok_or_else(|| self.protocol("the head gave no logits"))?;
                let chosen = self.choose(&logits, &mut sequences, seed, temperature)?;
                if first_rank != self.rank {
                    let bytes: Vec<u8> = chosen.iter().flat_map(|token| token.to_le_bytes()).collect();
                    self.send_to(first_rank, Tag::new(TagKind::User, 0, 0, step), bytes)?;
                }
            } else if self.rank == first_rank {
                let message = self.recv_from(last_rank, Tag::new(TagKind::User, 0, 0, step))?;
                for (sequence, token) in sequences.iter_mut().zip(message.chunks_exact(4)) {
                    sequence.push(u32::from_le_bytes([token[0], token[1], token[2], token[3]]));
                }
            } else {
                for sequence in &mut sequences {
                    sequence.push(0);
                }
            }
            self.progress.alive();
        }
        Ok((self.rank == last_rank).then_some(sequences))
    }

    /// One stage's part of a forward over all positions; hands its output on.
    fn logits_of(
        &mut self,
        stage: StageId,
        sequences: &[Vec<u32>],
        width: usize,
        step: u64,
    ) -> Result<Option<Lease>> {
        let (plan, seq_len) = (self.plan.clone(), self.plan.seq_len as usize);
        let layers = plan.stage(stage).layers();
        let shape = vec![width as u64, seq_len as u64, u64::from(plan.model.hidden_size)];
        let input = if layers.start == 0 {
            // Positions after the last token do not reach back through causal attention.
            let mut ids = vec![0u32; width * seq_len];
            for (row, sequence) in ids.chunks_exact_mut(seq_len).zip(sequences) {
                row[..sequence.len()].copy_from_slice(sequence);
            }
            tokens::token_lease("input_ids", vec![width as u64, seq_len as u64], &ids)
        } else {
            let from = neighbour(&plan, stage, true).ok_or_else(|| self.protocol("no stage before"))?;
            let tag = Tag::new(TagKind::Activation, stage.0, 0, step);
            let message = self.recv_from(plan.stage(from).rank(), tag)?;
            Lease::of_bytes("hidden", DType::F32, shape, message)
        };
        let ticket = self.engine.logits(stage, Edge::new(vec![input]))?;
        let mut output = ticket.wait(std::time::Instant::now() + self.step_deadline)?;
        let Some(next) = neighbour(&plan, stage, false) else {
            return Ok(output.take("logits"));
        };
        let hidden = output.take("hidden").ok_or_else(|| self.protocol("the stage gave no hidden"))?;
        let tag = Tag::new(TagKind::Activation, next.0, 0, step);
        self.send_to(plan.stage(next).rank(), tag, SendBuffer::lease(Arc::new(hidden)))?;
        Ok(None)
    }

    fn choose(
        &self,
        logits: &Lease,
        sequences: &mut [Vec<u32>],
        seed: u64,
        temperature: f64,
    ) -> Result<Vec<u32>> {
        let (vocab, seq_len) = (self.plan.model.vocab_size as usize, self.plan.seq_len as usize);
        let logits = logits.as_f32()?;
        let mut chosen = Vec::new();
        for (row, sequence) in sequences.iter_mut().enumerate() {
            let at = (row * seq_len + sequence.len() - 1) * vocab;
            let scores = logits.get(at..at + vocab).ok_or_else(|| self.protocol("logits are too short"))?;
            let draw = uniform_at(seed, (row * seq_len + sequence.len()) as u64);
            let token = sample(scores, temperature, draw);
            sequence.push(token);
            chosen.push(token);
        }
        Ok(chosen)
    }
}

/// The likeliest token at temperature 0, else one drawn from the softmax by a uniform in (0, 1].
fn sample(scores: &[f32], temperature: f64, draw: f64) -> u32 {
    let best = scores.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(at, _)| at);
    if temperature <= 0.0 {
        return best as u32;
    }
    let weight = |score: f32| ((f64::from(score) - f64::from(scores[best])) / temperature).exp();
    let mut left = draw * scores.iter().map(|score| weight(*score)).sum::<f64>();
    for (at, score) in scores.iter().enumerate() {
        left -= weight(*score);
        if left <= 0.0 {
            return at as u32;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::sample;

    #[test]
    fn sampling_follows_the_softmax() {
        let scores = [0.0, 1.0, f32::NEG_INFINITY];
        assert_eq!(sample(&scores, 0.0, 0.01), 1);
        let p0 = 1.0 / (1.0 + 1f64.exp());
        assert_eq!(sample(&scores, 1.0, p0 - 1e-6), 0);
        assert_eq!(sample(&scores, 1.0, p0 + 1e-6), 1);
        assert_eq!(sample(&scores, 1.0, 1.0), 1);
    }
}
