//! An error with its causes, as one line of a log or at the end of the program.

use std::error::Error;

/// The error and its causes. A cause that the text before it has said already is not said again:
/// many errors repeat their source.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = error.source();
    }
    let message = message.replace(['\n', '\r'], " ");
    match crate::tls::remedy(&message) {
        Some(remedy) => format!("{message}; {remedy}"),
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("could not listen: {0}")]
    struct Repeats(#[from] std::io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("the start failed: {0}")]
    struct RepeatsAll(#[source] Repeats);

    #[derive(Debug, thiserror::Error)]
    #[error("the node ended")]
    struct Keeps(#[source] Repeats);

    #[test]
    fn each_cause_is_said_once_in_one_line() {
        let refused = || Repeats(std::io::Error::other("refused\nby the kernel"));
        let line = "could not listen: refused by the kernel";
        assert_eq!(chain(&refused()), line);
        assert_eq!(
            chain(&RepeatsAll(refused())),
            format!("the start failed: {line}")
        );
        assert_eq!(chain(&Keeps(refused())), format!("the node ended: {line}"));
        let error = anyhow::Error::from(refused()).context("no lab");
        assert_eq!(chain(error.as_ref()), format!("no lab: {line}"));
    }
}
