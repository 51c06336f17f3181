"""One model over several processes: tensor parallel on `torch.distributed`."""
