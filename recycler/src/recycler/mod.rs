//! The worker that keeps the file small: what it does next is [`policy`]'s decision, what moves where [`plan`]'s.

mod compact;
mod compress;
mod erase;
mod pacing;
mod place;
mod plan;
mod policy;
mod punch;
mod repack;
mod shared;
mod worker;

pub use compact::{CompactReport, Progress, compact};
pub use compress::{CompressReport, compress};
pub use worker::{Control, run};
