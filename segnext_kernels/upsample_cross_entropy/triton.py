def forward(*args): raise NotImplementedError
def backward(*args): raise NotImplementedError
