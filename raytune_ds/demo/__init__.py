"""The bundled demo: small glossary facts and question phrasings that show LoRA learning a new domain."""
